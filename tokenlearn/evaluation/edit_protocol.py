"""Edits of held-out images by tokens that stand for attributes, and the measures of these edits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from tokenlearn.diffusion import Inverted
from tokenlearn.editing import ImageEditor
from tokenlearn.errors import UserError
from tokenlearn.evaluation.image_rows import ImageRows
from tokenlearn.evaluation.ledits import LEditsPPEditor
from tokenlearn.evaluation.records import Records
from tokenlearn.metrics import perceptual_distance, rank_correlation
from tokenlearn.models import Conditioning, TimmClassifier
from tokenlearn.models.attributes import Attribute

Removal = Literal["negative", "opposite", "difference"]
"""How to move away from a class.

``negative``
    By the class's token at a negative scale.
``opposite``
    Towards the opposite class, where an attribute has two.
``difference``
    Half of each, so that the common part of both tokens cancels.
"""

RECONSTRUCTION = "reconstruction"
"""Method of the records of images that are inverted and denoised without an edit."""

LEDITS = "ledits pp"
"""Method of the records of edits by LEDITS++."""

DO_NOTHING = "do nothing"
"""Item of these records: the row that every edit is to be compared with."""


class Direction(NamedTuple):
    """A class of an attribute, which edits add to images or remove from them.

    Attributes:
        name: the class.
        attribute: index of its attribute.
        target: index of the class in the attribute.
    """

    name: str
    attribute: int
    target: int


def directions_of(attributes: Sequence[Attribute]) -> list[Direction]:
    """A direction for the presence of an attribute with two classes, else one for each class."""
    return [
        Direction(attribute.class_names[target], index, target)
        for index, attribute in enumerate(attributes)
        for target in ([1] if len(attribute.classes) == 2 else range(len(attribute.classes)))
    ]


class Conditions(NamedTuple):
    """Conditionings that add a class or remove it.

    Attributes:
        present: one row for the class.
        absent: one row for the opposite class, None where there is none.
    """

    present: Conditioning
    absent: Conditioning | None


class Term(NamedTuple):
    """A condition and its signed guidance scales (B,)."""

    condition: Conditioning
    scales: Tensor


def guidance_terms(conditions: Conditions, signed: Tensor, removal: Removal) -> Iterator[Term]:
    """The terms of the guidance that adds or removes a class.

    Args:
        conditions: of the class.
        signed: (B,) scales, positive to add and negative to remove.
        removal: how the class is removed.
    """
    if conditions.absent is None or removal == "negative":
        yield Term(conditions.present, signed)
    elif removal == "opposite":
        # One evaluation per image: of the class or of its opposite, by the sign of the image's scale.
        both = Conditioning.cat([conditions.absent, conditions.present])
        yield Term(both[(signed > 0).long()], signed.abs())
    else:
        towards_absence = (-signed).clamp(min=0) / 2
        yield Term(conditions.present, signed + towards_absence)
        yield Term(conditions.absent, towards_absence)


class EditProtocol:
    """Edits images in every direction, by every method and at every strength, and records the judge's view of them.

    Each image is edited in the direction that it needs: a class that it shows is removed, another one is added.

    Args:
        editor: inverts and denoises images.
        source: one row, conditioning of the inversion.
        conditions: method to its conditions for each direction. The first method is the tested one.
        attributes: edited attributes, as the judge knows them.
        watched: further attributes that edits should leave alone.
        judge: judges the edits.
        strengths: guidance scales.
        strength: scale of transfer and combinations, and of example images.
        removal: how classes are removed.
        combinations: names of directions to edit together.
        ledits: edits by LEDITS++ in the same directions, as one more method; None without.
        records: takes the measurements.
        image_rows: takes example images.

    Attributes:
        directions: directions of the edits.

    Raises:
        UserError: if a combination has an unknown direction.
    """

    def __init__(
        self,
        *,
        editor: ImageEditor,
        source: Conditioning,
        conditions: Mapping[str, Sequence[Conditions]],
        attributes: Sequence[Attribute],
        watched: Sequence[Attribute],
        judge: TimmClassifier,
        strengths: Sequence[float],
        strength: float,
        removal: Removal,
        combinations: Sequence[Sequence[str]],
        records: Records,
        image_rows: ImageRows,
        ledits: LEditsPPEditor | None = None,
    ) -> None:
        self.editor, self.source, self.conditions = editor, source, conditions
        self.attributes, self.judge = [*attributes, *watched], judge
        self.strengths, self.strength, self.removal = list(strengths), strength, removal
        self.records, self.image_rows, self.ledits = records, image_rows, ledits
        self.directions = directions_of(attributes)
        self.combinations = [[self._direction_index(name) for name in names] for names in combinations]

    @property
    def methods(self) -> list[str]:
        """The compared methods, first the tested one."""
        return [*self.conditions, *([] if self.ledits is None else [LEDITS])]

    @property
    def tested(self) -> str:
        """The tested method."""
        return next(iter(self.conditions))

    def classes(self, images: Tensor) -> Tensor:
        """Class (B, attributes) of each attribute that the judge sees in images (B, 3, H, W)."""
        outputs = self.judge(images)
        return torch.stack([attribute.class_index(outputs) for attribute in self.attributes], dim=1)

    def edit(self, noisy: Inverted, terms: Sequence[tuple[Conditions, Tensor]]) -> Tensor:
        """Edited images (B, 3, H, W) in [0, 1].

        Args:
            noisy: B inverted images.
            terms: conditions and (B,) signed scales of each direction.
        """
        parts = [part for conditions, signed in terms for part in guidance_terms(conditions, signed, self.removal)]
        return self.editor.denoise_towards(
            noisy, self.source, [part.condition for part in parts], [part.scales for part in parts]
        )

    def measure(
        self,
        images: Tensor,
        latents: Tensor,
        names: Sequence[str],
        masks: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Edit images in every direction.

        Args:
            images: (B, 3, H, W) in [0, 1].
            latents: (B, C, h, w) of the images.
            names: B names.
            masks: direction to the pixels (B, H, W) that it changes, where they are known.
        """
        noisy = self.editor.invert(latents, self.source)
        before, trunk = self.classes(images), self.judge.trunk_features(images)
        unedited = self.edit(noisy, [])
        self._measure_reconstruction(unedited, images, names, masks, before=before, trunk=trunk)
        self.image_rows.add("image", images)
        for method, conditions in self.conditions.items():
            for direction, of_direction in zip(self.directions, conditions, strict=True):
                present = before[:, direction.attribute] == direction.target
                scales = _signs(present)[:, None] * torch.tensor(self.strengths, device=noisy.device)
                edited = self._edit_at_scales(noisy, of_direction, scales)
                self._record_edits(edited, images, names, masks, method, direction, before=before, trunk=trunk)
                if method == self.tested:
                    self.image_rows.add(direction.name, edited[:, self.strengths.index(self.strength)])
                    others = self._edit_at_scales(noisy, of_direction, -scales)
                    tried = [unedited, *edited.unbind(dim=1), *others.unbind(dim=1)]
                    all_scales = torch.cat([torch.zeros_like(scales[:, :1]), scales, -scales], dim=1)
                    self._measure_ranks(tried, all_scales, direction, present, names)
        if self.ledits is not None:
            targets = torch.tensor([direction.target for direction in self.directions], device=before.device)
            shown = before[:, [direction.attribute for direction in self.directions]] == targets
            strengths = torch.tensor(self.strengths, device=before.device)
            edits = self.ledits.edit(images, _signs(shown)[:, :, None] * strengths)
            for direction, edited in zip(self.directions, edits.unbind(dim=1), strict=True):
                self._record_edits(edited, images, names, masks, LEDITS, direction, before=before, trunk=trunk)
        self._measure_combinations(noisy, before, names)

    def _record_edits(
        self,
        edited: Tensor,
        images: Tensor,
        names: Sequence[str],
        masks: Mapping[str, Tensor],
        method: str,
        direction: Direction,
        *,
        before: Tensor,
        trunk: Tensor,
    ) -> None:
        """Record edits (B, S, 3, H, W) of images in one direction, by a method at all strengths."""
        present = before[:, direction.attribute] == direction.target
        for strength, part in zip(self.strengths, edited.unbind(dim=1), strict=True):
            record = partial(
                self.records.update,
                seeds=names,
                method=method,
                item=direction.name,
                side=_sides(present),
                strength=strength,
            )
            after = self.classes(part)
            record("success", (after[:, direction.attribute] == direction.target) != present)
            for index, attribute in enumerate(self.attributes):
                if index != direction.attribute:
                    record("kept", after[:, index] == before[:, index], label=attribute.name)
            record("psnr", _psnr(part, images))
            record("perceptual_distance", perceptual_distance(self.judge.trunk_features(part), trunk))
            if direction.name in masks:
                record("background_error", background_error(part, images, masks[direction.name]))

    def _measure_reconstruction(
        self,
        unedited: Tensor,
        images: Tensor,
        names: Sequence[str],
        masks: Mapping[str, Tensor],
        *,
        before: Tensor,
        trunk: Tensor,
    ) -> None:
        """Measure the round trip of images (B, 3, H, W) as if it were an edit in every direction."""
        record = partial(self.records.update, seeds=names, method=RECONSTRUCTION, item=DO_NOTHING)
        after = self.classes(unedited)
        for direction in self.directions:
            present = before[:, direction.attribute] == direction.target
            changed = (after[:, direction.attribute] == direction.target) != present
            record("success", changed, side=_sides(present), label=direction.name)
            if direction.name in masks:
                error = background_error(unedited, images, masks[direction.name])
                record("background_error", error, side=_sides(present), label=direction.name)
        for index, attribute in enumerate(self.attributes):
            record("kept", after[:, index] == before[:, index], label=attribute.name)
        record("psnr", _psnr(unedited, images))
        record("perceptual_distance", perceptual_distance(self.judge.trunk_features(unedited), trunk))

    def measure_transfer(self, images: Tensor, latents: Tensor, names: Sequence[str], groups: Sequence[str]) -> None:
        """Edit images of other groups (B) than the tokens were learned from; other arguments as in :meth:`measure`."""
        noisy = self.editor.invert(latents, self.source)
        before = self.classes(images)
        for direction, conditions in zip(self.directions, self.conditions[self.tested], strict=True):
            present = before[:, direction.attribute] == direction.target
            edited = self.edit(noisy, [(conditions, _signs(present) * self.strength)])
            changed = (self.classes(edited)[:, direction.attribute] == direction.target) != present
            self.records.update(
                "transfer",
                changed,
                names,
                method=self.tested,
                item=groups,
                side=_sides(present),
                label=direction.name,
            )

    def _direction_index(self, name: str) -> int:
        names = [direction.name for direction in self.directions]
        if name not in names:
            raise UserError(
                f"evaluation.combinations has '{name}', which is not a learned class; choose among {', '.join(names)}"
            )
        return names.index(name)

    def _edit_at_scales(self, noisy: Inverted, conditions: Conditions, scales: Tensor) -> Tensor:
        """Edits (B, S, 3, H, W) of B inverted images at scales (B, S)."""
        batch, count = scales.shape
        edited = self.edit(noisy.repeat_interleave(count, dim=0), [(conditions, scales.flatten())])
        return edited.reshape(batch, count, *edited.shape[1:])

    def _measure_ranks(
        self, tried: Sequence[Tensor], scales: Tensor, direction: Direction, present: Tensor, names: Sequence[str]
    ) -> None:
        """Rank the judge's logit of S edits (B, 3, H, W) against their scales (B, S)."""
        scores = torch.stack([self._scores(images, direction) for images in tried], dim=1)
        ranks = rank_correlation(scores, scales, present)
        for measure, values in (
            ("rank_correlation", ranks.needed),
            ("both_sides_rank_correlation", ranks.both_sides),
        ):
            self.records.update(measure, values, names, method=self.tested, item=direction.name)

    def _scores(self, images: Tensor, direction: Direction) -> Tensor:
        """The judge's logit (B,) of a class against all others of its attribute."""
        logits = self.attributes[direction.attribute].logits(self.judge(images))
        others = [index for index in range(logits.shape[1]) if index != direction.target]
        return logits[:, direction.target] - logits[:, others].logsumexp(dim=1)

    def _measure_combinations(self, noisy: Inverted, before: Tensor, names: Sequence[str]) -> None:
        """Edit several directions at once."""
        for combination in self.combinations:
            chosen = [self.directions[index] for index in combination]
            present = torch.stack([before[:, item.attribute] == item.target for item in chosen], dim=1)
            scales = _signs(present) * self.strength
            conditions = [self.conditions[self.tested][index] for index in combination]
            edited = self.edit(noisy, list(zip(conditions, scales.unbind(dim=1), strict=True)))
            after = self.classes(edited)
            changed = torch.stack([after[:, item.attribute] == item.target for item in chosen], dim=1) != present
            name = " + ".join(item.name for item in chosen)
            record = partial(self.records.update, seeds=names, method=self.tested, item=name)
            record("all parts", changed.all(dim=1))
            for index, item in enumerate(chosen):
                record("part", changed[:, index], label=item.name)
            self.image_rows.add(name, edited)


def background_error(images: Tensor, others: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference (B,) of pixels outside a mask; NaN where nothing is outside.

    Args:
        images: (B, 3, H, W) in [0, 1].
        others: the same shape.
        mask: (B, H, W), whether a pixel may change.
    """
    outside = ~mask
    differences = (images - others).abs().mean(dim=1)
    return (differences * outside).sum(dim=(1, 2)) / outside.sum(dim=(1, 2))


def _signs(present: Tensor) -> Tensor:
    """Sign of the edit that images need: 1 to add an absent class, -1 to remove a present one."""
    return torch.where(present, -1.0, 1.0)


def _sides(present: Tensor) -> list[str]:
    return ["remove" if shows_it else "add" for shows_it in present.tolist()]


def _psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB."""
    ratios: Tensor = peak_signal_noise_ratio(images, others, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratios
