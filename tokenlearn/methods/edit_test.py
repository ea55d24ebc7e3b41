"""The test of tokens that stand for attributes: held-out pictures are edited, and a judge looks at the edits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from tokenlearn.diffusion import Inverted
from tokenlearn.errors import UserError
from tokenlearn.methods.attributes import Attribute
from tokenlearn.methods.editing import Inversion, PictureEditor
from tokenlearn.metrics import (
    ClassAccuracy,
    GroupMeans,
    PictureRows,
    Report,
    ScaleRanks,
    interval_cells,
    interval_columns,
    mean_share,
    perceptual_distance,
)
from tokenlearn.models import Conditioning, TimmClassifier

Removal = Literal["negative", "opposite", "difference"]

_DIRECTIONS = ("add", "remove")


@dataclass(frozen=True)
class EditTest:
    """How ``test`` edits held-out pictures.

    Attributes:
        timestep: noise level to invert pictures to, of the sampling steps'; more changes more.
        num_inference_steps: steps of DDIM between clean pictures and pure noise.
        inversion: how pictures are inverted, see :class:`tokenlearn.methods.editing.PictureEditor`.
        strengths: guidance scales to try.
        strength: the one of them that the table is of.
        removal: how to move away from a class: by its token at a negative scale; towards the opposite class, where
            an attribute has two; or by half of each, so that what both tokens have in common cancels.
        prompts: class to a prompt that asks for it: the column of prompt editing.
        embeddings: files of textual inversion's tokens for the classes, by the class in their metadata: a column.
        random_tokens: whether to have a column of tokens that nobody learned.
        watched: labels of the judge that edits should leave alone, besides the other attributes of the run.
        combinations: classes to change in one edit.
        group_column: label of the pictures that tells groups of the transfer test apart, such as ``style``.
    """

    timestep: int = 601
    num_inference_steps: int = 20
    inversion: Inversion = "ddim"
    strengths: list[float] = field(default_factory=lambda: [2.0, 4.0, 6.0])
    strength: float = 4.0
    removal: Removal = "negative"
    prompts: dict[str, str] = field(default_factory=dict)
    embeddings: list[str] = field(default_factory=list)
    random_tokens: bool = True
    watched: list[str] = field(default_factory=list)
    combinations: list[list[str]] = field(default_factory=list)
    group_column: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if not self.strengths or min(self.strengths) <= 0:
            raise UserError(f"model.test.strengths must be positive numbers, at least one, got {self.strengths}")
        if self.strength not in self.strengths:
            raise UserError(f"model.test.strength {self.strength} is not among model.test.strengths; add it there")


class Direction(NamedTuple):
    """Something that pictures show or do not, and that edits add or remove: a class of an attribute.

    Attributes:
        name: the class.
        attribute: index of its attribute.
        target: index of the class in the attribute.
    """

    name: str
    attribute: int
    target: int


def directions_of(attributes: Sequence[Attribute]) -> list[Direction]:
    """One for the presence of what has two classes, else one for each class."""
    return [
        Direction(attribute.class_names[target], index, target)
        for index, attribute in enumerate(attributes)
        for target in ([1] if len(attribute.classes) == 2 else range(len(attribute.classes)))
    ]


class Conditions(NamedTuple):
    """What a picture is denoised under to add a class or to remove it.

    Attributes:
        present: one row.
        absent: one row for the opposite class, None where there is none.
    """

    present: Conditioning
    absent: Conditioning | None


class EditTally(nn.Module):
    """Edits test pictures and counts what the judge sees.

    Args:
        settings: how pictures are edited.
        editor: inverts and denoises.
        unconditional: one row for the empty prompt.
        conditions: method to its conditions for each of the directions; the first method is the tested one.
        attributes: attributes as the judge knows them.
        watched: further ones, which are not edited.
        judge: looks at the edits.
        groups: names of the groups of the transfer test.
    """

    def __init__(
        self,
        settings: EditTest,
        editor: PictureEditor,
        unconditional: Conditioning,
        conditions: Mapping[str, Sequence[Conditions]],
        attributes: Sequence[Attribute],
        watched: Sequence[Attribute],
        judge: TimmClassifier,
        groups: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.settings, self.editor, self.unconditional = settings, editor, unconditional
        self.conditions, self.attributes, self.groups = conditions, [*attributes, *watched], groups
        # The judge belongs to the task; as a module of this one it would be moved and counted twice.
        self._judge = (judge,)
        self.directions = directions_of(attributes)
        self.combinations = [[self._direction(name) for name in names] for names in settings.combinations]
        self._cells = (len(conditions), len(self.directions), len(_DIRECTIONS), len(settings.strengths))
        cells = int(np.prod(self._cells))
        self.success, self.kept = ClassAccuracy(cells), ClassAccuracy(cells)
        self.psnr, self.distance = GroupMeans(cells), GroupMeans(cells)
        self.ranks = ScaleRanks(len(self.directions))
        self.reconstruction = GroupMeans(1)
        self.transfer = ClassAccuracy(max(1, len(groups)) * len(self.directions) * len(_DIRECTIONS))
        self._parts = [len(combination) for combination in self.combinations]
        self.combined = ClassAccuracy(max(1, len(self.combinations)))
        self.combined_parts = ClassAccuracy(max(1, sum(self._parts)))
        self.pictures = PictureRows()

    def _direction(self, name: str) -> int:
        names = [direction.name for direction in self.directions]
        if name not in names:
            raise UserError(
                f"model.test.combinations has '{name}', which is not learned; it may be {', '.join(names)}"
            )
        return names.index(name)

    @property
    def judge(self) -> TimmClassifier:
        """Looks at the edits."""
        return self._judge[0]

    def classes(self, images: Tensor) -> Tensor:
        """Class (B, attributes) of each attribute that the judge sees in images (B, 3, H, W)."""
        outputs = self.judge(images)
        return torch.stack([attribute.class_index(outputs) for attribute in self.attributes], dim=1)

    def _scores(self, images: Tensor, direction: Direction) -> Tensor:
        """The judge's logit (B,) of a class against all others of its attribute."""
        logits = self.attributes[direction.attribute].logits(self.judge(images))
        others = [index for index in range(logits.shape[1]) if index != direction.target]
        return logits[:, direction.target] - logits[:, others].logsumexp(dim=1)

    def edit(self, noisy: Inverted, terms: Sequence[tuple[Conditions, Tensor]]) -> Tensor:
        """Edit inverted pictures under the sum of several terms.

        Args:
            noisy: B rows.
            terms: conditions, and (B,) signed scales.

        Returns:
            (B, 3, H, W) images in [0, 1].
        """
        conditionals: list[Conditioning] = []
        scales: list[Tensor] = []
        for conditions, signed in terms:
            if conditions.absent is None or self.settings.removal == "negative":
                weights = [(conditions.present, signed)]
            elif self.settings.removal == "opposite":
                # One evaluation per picture: of the class or its opposite, as the sign of the picture has it.
                both = Conditioning.cat([conditions.absent, conditions.present])
                weights = [(both[(signed > 0).long()], signed.abs())]
            else:
                towards_absence = (-signed).clamp(min=0) / 2
                weights = [(conditions.present, signed + towards_absence), (conditions.absent, towards_absence)]
            for conditional, weight in weights:
                conditionals.append(conditional)
                scales.append(weight)
        return self.editor.denoise(noisy, self.unconditional, conditionals, scales)

    def update(self, images: Tensor, latents: Tensor) -> None:
        """Edit pictures (B, 3, H, W) in [0, 1], with their latents (B, C, h, w), in every direction."""
        noisy = self.editor.invert(latents, self.unconditional)
        before, trunk = self.classes(images), self.judge.trunk_features(images)
        nothing = self.editor.denoise(noisy, self.unconditional, [], [])
        self.reconstruction.update(_psnr(nothing, images), torch.zeros(len(images), dtype=torch.long).to(before))
        shown = before.unbind(dim=1)
        self.pictures.add("picture", images)
        for method, conditions in enumerate(self.conditions.values()):
            for number, (direction, own) in enumerate(zip(self.directions, conditions, strict=True)):
                present = shown[direction.attribute] == direction.target
                needed = _signs(present)[:, None] * torch.tensor(self.settings.strengths, device=noisy.device)
                edited = self._edit_each(noisy, own, needed)
                self._count(edited, images, before, trunk, direction, present, (method, number))
                if method == 0:
                    others = self._edit_each(noisy, own, -needed)
                    tried = [nothing, *edited.unbind(dim=1), *others.unbind(dim=1)]
                    scores = torch.stack([self._scores(part, direction) for part in tried], dim=1)
                    scales = torch.cat([torch.zeros_like(needed[:, :1]), needed, -needed], dim=1)
                    self.ranks.update(scores, scales, present, number)
                    headline = edited[:, self.settings.strengths.index(self.settings.strength)]
                    self.pictures.add(direction.name, headline)
        self._update_combinations(noisy, before)

    def update_transfer(self, images: Tensor, latents: Tensor, groups: Tensor) -> None:
        """Edit pictures of other groups (B,) than those that the tokens were learned from, where they need it."""
        noisy = self.editor.invert(latents, self.unconditional)
        before = self.classes(images)
        for number, direction in enumerate(self.directions):
            present = before[:, direction.attribute] == direction.target
            scales = _signs(present) * self.settings.strength
            edited = self.edit(noisy, [(self._own[number], scales)])
            changed = (self.classes(edited)[:, direction.attribute] == direction.target) != present
            cells = (groups * len(self.directions) + number) * len(_DIRECTIONS) + present.long()
            self.transfer.update(changed, cells)

    @property
    def _own(self) -> Sequence[Conditions]:
        return next(iter(self.conditions.values()))

    def _edit_each(self, noisy: Inverted, conditions: Conditions, scales: Tensor) -> Tensor:
        """Edits (B, S, 3, H, W) of inverted pictures (B, C, h, w) at scales (B, S)."""
        batch, count = scales.shape
        edited = self.edit(noisy.repeat_interleave(count, dim=0), [(conditions, scales.flatten())])
        return edited.reshape(batch, count, *edited.shape[1:])

    def _count(
        self,
        edited: Tensor,
        images: Tensor,
        before: Tensor,
        trunk: Tensor,
        direction: Direction,
        present: Tensor,
        cell: tuple[int, int],
    ) -> None:
        others = [index for index in range(len(self.attributes)) if index != direction.attribute]
        for strength, part in enumerate(edited.unbind(dim=1)):
            after = self.classes(part)
            first = int(np.ravel_multi_index((*cell, 0, strength), self._cells))
            cells = first + present.long() * self._cells[-1]
            self.success.update((after[:, direction.attribute] == direction.target) != present, cells)
            kept = after[:, others] == before[:, others]
            self.kept.update(kept.flatten(), cells.repeat_interleave(len(others)))
            self.psnr.update(_psnr(part, images), cells)
            self.distance.update(perceptual_distance(self.judge.trunk_features(part), trunk), cells)

    def _update_combinations(self, noisy: Inverted, before: Tensor) -> None:
        first = 0
        for number, combination in enumerate(self.combinations):
            chosen = [self.directions[index] for index in combination]
            present = torch.stack([before[:, item.attribute] == item.target for item in chosen], dim=1)
            scales = _signs(present) * self.settings.strength
            own = [self._own[index] for index in combination]
            edited = self.edit(noisy, list(zip(own, scales.unbind(dim=1), strict=True)))
            after = self.classes(edited)
            now = torch.stack([after[:, item.attribute] == item.target for item in chosen], dim=1)
            changed = now != present
            self.combined.update(changed.all(dim=1), torch.full_like(before[:, 0], number))
            parts = first + torch.arange(len(chosen), device=before.device).expand(len(before), -1)
            self.combined_parts.update(changed.flatten(), parts.flatten())
            self.pictures.add(" + ".join(item.name for item in chosen), edited)
            first += len(chosen)

    def report(self) -> Report:
        """The table of all processes together; see :class:`tokenlearn.metrics.Report`."""
        settings = self.settings
        methods = list(self.conditions)
        success, kept = (metric.compute().reshape(*self._cells, 2).cpu() for metric in (self.success, self.kept))
        psnr, distance = (metric.compute().reshape(self._cells).cpu() for metric in (self.psnr, self.distance))
        at = settings.strengths.index(settings.strength)
        ranks = self.ranks.compute()

        columns = ["direction"]
        rows: list[list[str | float | None]] = [[direction.name] for direction in self.directions]
        plain: list[str] = []
        summary: dict[str, float] = {}
        curves: dict[str, list[tuple[float, float]]] = {}
        for method, name in enumerate(methods):
            prefix = "" if method == 0 else f"{name.replace(' ', '_')}_"
            for side, what in enumerate(_DIRECTIONS):
                counts = success[method, :, side, at].tolist()
                columns += interval_columns(f"{prefix}{what}")
                for row, of_direction in zip(rows, counts, strict=True):
                    row += interval_cells(*of_direction)
                summary[f"{prefix}{what}_success"] = mean_share(success[method, :, side, at])
                plain += [f"{prefix}{what}"] if method else []
            both = kept[method, :, :, at].sum(dim=1)
            names = [f"{prefix}untouched_kept", f"{prefix}psnr", f"{prefix}perceptual_distance"]
            columns += names
            plain += names
            for number, row in enumerate(rows):
                row += [
                    interval_cells(*both[number].tolist())[0],
                    float(psnr[method, number, :, at].nanmean()),
                    float(distance[method, number, :, at].nanmean()),
                ]
            summary[names[0]] = mean_share(both)
            summary[names[1]] = float(psnr[method, :, :, at].nanmean())
            summary[names[2]] = float(distance[method, :, :, at].nanmean())
            curves[name] = [
                (
                    mean_share(kept[method, :, :, strength].sum(dim=1)),
                    mean_share(success[method, :, :, strength].flatten(0, 1)),
                )
                for strength in range(len(settings.strengths))
            ]
        columns += ranks
        plain += ranks
        for number, row in enumerate(rows):
            row += [float(values[number]) for values in ranks.values()]
        summary |= {name: float(values.nanmean()) for name, values in ranks.items()}
        summary["reconstruction_psnr"] = float(self.reconstruction.compute())
        own_curve, own_kept = curves[methods[0]], summary["untouched_kept"]
        for name in methods[1:]:
            if (found := success_at_equal_kept(own_curve, curves[name], own_kept)) is not None:
                key = name.replace(" ", "_")
                summary[f"success_at_kept_of_{key}"], summary[f"{key}_success_at_equal_kept"] = found
        rows += self._more_rows(len(columns), summary)
        return Report(
            title=f"edits judged by {self.judge.pretrained}",
            columns=columns,
            rows=rows,
            bars=list(_DIRECTIONS),
            summary=summary,
            plain=plain,
            curves=curves,
            pictures={"edits": self.pictures.rows()},
        )

    def _more_rows(self, width: int, summary: dict[str, float]) -> Iterator[list[str | float | None]]:
        """Rows for the groups of the transfer test and for combinations, which have no more than the success."""
        transfer = self.transfer.compute().reshape(-1, len(self.directions), len(_DIRECTIONS), 2).cpu()
        for group, counts in zip(self.groups, transfer, strict=False):
            if not counts[..., 1].any():
                continue
            cells: list[str | float | None] = []
            for side in range(len(_DIRECTIONS)):
                cells += interval_cells(*counts[:, side].sum(dim=0).tolist())
            summary[f"transfer_{group.replace(' ', '_')}"] = mean_share(counts.flatten(0, 1))
            yield [group, *cells, *[None] * (width - 1 - len(cells))]
        parts = torch.split(self.combined_parts.compute(), self._parts) if self._parts else ()
        for number, (names, counts) in enumerate(zip(self.settings.combinations, parts, strict=True)):
            changed, total = self.combined.compute()[number].tolist()
            summary[f"combination_{number + 1}_all"] = changed / total
            summary[f"combination_{number + 1}_each"] = mean_share(counts)
            shares = interval_cells(changed, total)
            yield [" + ".join(names), *shares, *[None] * (width - 1 - len(shares))]


def success_at_equal_kept(
    own: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], wanted: float
) -> tuple[float, float] | None:
    """Success of two methods where they keep as much, the share nearest to a wanted one that both reach; None if none.

    Args:
        own: (kept, success) at rising strength.
        other: the same of the other method.
        wanted: share that is kept.
    """
    curves = [np.array(sorted(points)) for points in (own, other)]
    lowest, highest = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    if lowest > highest:
        return None
    level = np.clip(wanted, lowest, highest)
    first, second = (float(np.interp(level, curve[:, 0], curve[:, 1])) for curve in curves)
    return first, second


def _signs(present: Tensor) -> Tensor:
    """Sign of the edit that pictures need: +1 to add what they do not show, -1 to remove what they do."""
    return torch.where(present, -1.0, 1.0)


def _psnr(images: Tensor, others: Tensor) -> Tensor:
    """(B,) in dB."""
    ratios: Tensor = peak_signal_noise_ratio(images, others, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratios
