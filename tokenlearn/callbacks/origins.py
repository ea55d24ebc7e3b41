"""The origin of a run's images, and files in its folder that are not of the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L

from tokenlearn.diffusion import ReversibleSolver
from tokenlearn.notices import notice
from tokenlearn.pipeline import Sampling
from tokenlearn.provenance import Origin, check_tokens_of, token_hashes
from tokenlearn.token_task import TokenTask


def origin_of(
    module: L.LightningModule, config: Mapping[str, Any], expected: Mapping[str, Any] | None = None
) -> Origin:
    """What all images of a task are made with; of a module that is no task of this package, the config alone.

    Args:
        module: the task, with its tokens.
        config: the run's config.
        expected: what an image that is to be made again says about itself.

    Raises:
        UserError: if tokens are not those that are expected.
    """
    pipeline = getattr(module, "pipeline", None)
    if not isinstance(module, TokenTask) or pipeline is None:
        return Origin(config, {}, Sampling(), type(module).__name__, "", "")
    solver = pipeline.sampling.solver
    chosen = solver if isinstance(solver, ReversibleSolver) else module.backbone.make_scheduler(solver)
    tokens = token_hashes(module.bank)
    if expected is not None:
        check_tokens_of(expected, tokens)
    return Origin(
        config,
        tokens,
        pipeline.sampling,
        module.backbone.pretrained,
        type(chosen).__name__,
        module.vocabulary_hash,
    )


def say_what_is_not_of_the_run(folder: Path, subfolders: Iterable[str], files: Iterable[Path]) -> None:
    """Tell of images in a run's folder that are not among its files; they are left as they are.

    Args:
        folder: the run folder.
        subfolders: folders below it to look in, at any depth.
        files: all files of the run.
    """
    own = set(files)
    others = [
        path
        for subfolder in subfolders
        for path in sorted((folder / subfolder).rglob("*.png"))
        if path not in own and path.name[0] != "."
    ]
    if others:
        notice(
            f"'{folder}' has {len(others)} images that are not of this run, such as "
            f"'{others[0].relative_to(folder)}'; they stay as they are: give another --output_dir to keep runs apart"
        )
