"""Diffusion maths on tensors: noise processes, sampling and inversion by any solver, with a gradient."""

from tokenlearn.diffusion.edit_friendly import Inverted, edit_friendly_noise
from tokenlearn.diffusion.gradients import Checkpointed, Detached, Gradient, LastK, OneStep, Reversible, Stored
from tokenlearn.diffusion.inversion import invert
from tokenlearn.diffusion.process import DiscreteProcess, FlowProcess, Kind, Process, add_noise, convert
from tokenlearn.diffusion.sampling import sample
from tokenlearn.diffusion.solvers import (
    EDICT,
    OBELM,
    GridSolver,
    Leapfrog,
    ReversibleSolver,
    SchedulerSolver,
    Solver,
)

__all__ = [
    "EDICT",
    "OBELM",
    "Checkpointed",
    "Detached",
    "DiscreteProcess",
    "FlowProcess",
    "Gradient",
    "GridSolver",
    "Inverted",
    "Kind",
    "LastK",
    "Leapfrog",
    "OneStep",
    "Process",
    "Reversible",
    "ReversibleSolver",
    "SchedulerSolver",
    "Solver",
    "Stored",
    "add_noise",
    "convert",
    "edit_friendly_noise",
    "invert",
    "sample",
]
