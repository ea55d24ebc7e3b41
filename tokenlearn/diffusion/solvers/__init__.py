"""Solvers of the sampling equation: diffusers schedulers and exactly reversible ones, one file each."""

from tokenlearn.diffusion.solvers.base import Model, Solver
from tokenlearn.diffusion.solvers.edict import EDICT
from tokenlearn.diffusion.solvers.leapfrog import Leapfrog
from tokenlearn.diffusion.solvers.o_belm import OBELM
from tokenlearn.diffusion.solvers.reversible import GridSolver, ReversibleSolver
from tokenlearn.diffusion.solvers.scheduler import SchedulerSolver

__all__ = ["EDICT", "OBELM", "GridSolver", "Leapfrog", "Model", "ReversibleSolver", "SchedulerSolver", "Solver"]
