"""The page in a browser, by Gradio: controls, images, and what happens where a control is moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr
import torch
from PIL import Image

from tokenlearn.errors import UserError
from tokenlearn.page.downloads import Downloads
from tokenlearn.page.drawing import Frame
from tokenlearn.page.request import MOST_CHARACTERS, MOST_GUIDANCE, MOST_STEPS, PageRequest, parse_seeds
from tokenlearn.page.studio import Studio
from tokenlearn.tokens.files import EmbeddingFile, EmbeddingFormat

CONCEPTS = 3
"""Rows for concepts."""
_CONCEPT_REACH = 15.0
_MOST_SLIDERS = 64
_SHOWN_SLIDERS = 10
_SHOWN_LABELS = 10
_GALLERY = 340  # pixels
_SMALLEST, _LARGEST = 512, 1024  # pixels of a shown image's longer side; saved images have their own size
CSS = """
#status p { color: var(--body-text-color-subdued); margin: 0; }
#after img, #before img { object-fit: contain; }
"""
_MODEL: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
"""One request after another: the model takes all cores."""
_TOKENS = "**Tokens.** The image follows when a slider is released; at 0, a slider does nothing at all."
_CONCEPTS = "**Concepts**: words, a token, or a sum such as `king - male`. A negative scale removes."


def build(studio: Studio, first: PageRequest, *, title: str) -> gr.Blocks:
    """The page of a studio.

    Args:
        studio: model, tokens and judge.
        first: what the page shows at first; photo, tokens and concepts are left out.
        title: heading.
    """
    blocks = gr.Blocks(title="tokenlearn", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400))
    with blocks:
        gr.Markdown(f"## {escape(title)}")
        page = _Page(studio, first)
        blocks.load(page.show, page.inputs, page.outputs, show_progress="hidden", api_visibility="private", **_MODEL)
        if studio.tokens:
            blocks.load(page.token_file, page.token_inputs, page.save_token, api_visibility="private")
    return blocks


def theme() -> gr.themes.Base:
    """Looks of the page, with the fonts of the computer: nothing is fetched from elsewhere."""
    fonts = ["system-ui", "sans-serif"]
    return gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"])


class _Page:
    """Controls and events of a page; it is to be made within a ``gr.Blocks``."""

    def __init__(self, studio: Studio, first: PageRequest) -> None:
        self.studio, self.downloads = studio, Downloads()
        self.slider_tokens = list(studio.tokens)[:_MOST_SLIDERS]
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self._add_inputs(first)
            with gr.Column(scale=4, min_width=360):
                self._add_sliders()
            with gr.Column(scale=5, min_width=420):
                self._add_outputs()
        self._connect()

    def _add_inputs(self, first: PageRequest) -> None:
        self.prompt = gr.Textbox(first.prompt, label="Prompt", info=self._prompt_hint(), max_length=MOST_CHARACTERS)
        self.seeds = gr.Textbox(", ".join(map(str, first.seeds)), label="Seeds", info="up to 8, one image each")
        self.button = gr.Button("Generate", variant="primary", elem_id="generate")
        self.photo = gr.File(
            label="Drop a photo to edit it instead", file_types=["image"], height=120, elem_id="photo"
        )
        with gr.Accordion("Sampling", open=False):
            self.negative_prompt = gr.Textbox(
                first.negative_prompt, label="Negative prompt", max_length=MOST_CHARACTERS
            )
            self.steps = gr.Slider(1, MOST_STEPS, first.steps, step=1, label="Steps")
            self.guidance = gr.Slider(0, MOST_GUIDANCE, first.guidance, step=0.5, label="Guidance")
            self.change = gr.Slider(
                0.1, 1, first.change, step=0.05, label="Reach of edits", info="the noise level that they go back to"
            )
        self._add_saving()

    def _add_saving(self) -> None:
        with gr.Accordion("Save", open=True):
            with gr.Row():
                self.save_image = gr.DownloadButton(
                    "Image", size="md", min_width=90, interactive=False, elem_id="save-image"
                )
                self.save_yaml = gr.DownloadButton(
                    "YAML", size="md", min_width=90, interactive=False, elem_id="save-yaml"
                )
            tokens, visible = list(self.studio.tokens), bool(self.studio.tokens)
            with gr.Row(visible=visible):
                self.token = gr.Dropdown(tokens, value=tokens[0] if tokens else None, label="Token", min_width=130)
                self.program = gr.Dropdown(list(get_args(EmbeddingFormat)), value="a1111", label="for", min_width=130)
            with gr.Row(visible=visible):
                self.token_strength = gr.Number(1.0, label="Strength", minimum=-100, maximum=100, min_width=90)
                self.save_token = gr.DownloadButton("Token", size="md", min_width=90, elem_id="save-token")

    def _add_sliders(self) -> None:
        shown = default_sliders(self.studio.tokens)
        self.sliders = []
        with gr.Column(visible=bool(self.slider_tokens)):
            gr.Markdown(_TOKENS)
            with gr.Row(elem_classes="sliders"):
                for token in self.slider_tokens:
                    self.sliders.append(self._slider(token, token in shown))
            with gr.Accordion("Which tokens have sliders", open=False):
                self.chosen = gr.Dropdown(
                    self.slider_tokens, value=shown, multiselect=True, show_label=False, elem_id="chosen"
                )
        with gr.Column():
            gr.Markdown(_CONCEPTS)
            self.words, self.scales = [], []
            for row in range(CONCEPTS):
                with gr.Row():
                    self.words.append(
                        gr.Textbox(label="Concept", show_label=row == 0, min_width=120, max_length=MOST_CHARACTERS)
                    )
                    self.scales.append(
                        gr.Slider(
                            -_CONCEPT_REACH,
                            _CONCEPT_REACH,
                            0,
                            step=0.5,
                            label="Scale",
                            show_label=row == 0,
                            scale=2,
                            buttons=[],
                        )
                    )

    def _slider(self, token: str, visible: bool) -> gr.Slider:
        even = self.studio.is_calibrated(token)
        step = 0.05 if even else 0.25
        # A slider steps from its lowest value, and must come by 0.
        low, high = (round(math.trunc(end / step * (1 + 1e-9)) * step, 6) for end in self.studio.strength_range(token))
        return gr.Slider(
            low,
            high,
            0,
            step=step,
            label=f"{token} (even)" if even else token,
            visible=visible,
            min_width=150,
            buttons=[],
            elem_id=f"slider-{token.strip('<>')}",
        )

    def _add_outputs(self) -> None:
        with gr.Row():
            looks: dict[str, Any] = {"columns": 2, "object_fit": "contain", "buttons": ["fullscreen"]}
            self.before = gr.Gallery(label="Before", elem_id="before", height=_GALLERY, interactive=False, **looks)
            self.after = gr.Gallery(label="After", elem_id="after", height=_GALLERY, interactive=False, **looks)
        self.status = gr.Markdown("", elem_id="status")
        judge = self.studio.judge
        self.opinion = gr.Dataframe(
            headers=["what it sees", "before", "after"],
            label="" if judge is None else f"Opinion of the judge {judge.pretrained}",
            visible=judge is not None,
            interactive=False,
            elem_id="opinion",
        )

    def _connect(self) -> None:
        self.inputs = [
            *(self.prompt, self.seeds, self.negative_prompt, self.steps, self.guidance, self.change, self.photo),
            *(self.chosen, *self.sliders, *self.words, *self.scales),
        ]
        self.token_inputs = [self.token, self.program, self.token_strength]
        self.outputs = [self.before, self.after, self.status, self.opinion, self.save_image, self.save_yaml]
        moved = [slider.release for slider in (*self.sliders, *self.scales)]
        typed = [box.submit for box in (self.prompt, self.seeds, self.negative_prompt, *self.words)]
        gr.on(
            [self.button.click, self.photo.upload, self.photo.clear, self.chosen.change, *moved, *typed],
            self.show,
            self.inputs,
            self.outputs,
            trigger_mode="always_last",
            show_progress="minimal",  # the place in the line, and the seconds
            show_progress_on=self.status,
            api_name="show",
            **_MODEL,
        )
        self.chosen.change(
            lambda chosen: [gr.update(visible=token in chosen) for token in self.slider_tokens],
            [self.chosen],
            self.sliders,
            queue=False,
            api_visibility="private",
        )
        if self.studio.tokens:
            gr.on(
                [self.token.change, self.program.change, self.token_strength.change],
                self.token_file,
                self.token_inputs,
                self.save_token,
                api_name="token_file",
            )

    def show(
        self,
        prompt: str,
        seeds: str,
        negative_prompt: str,
        steps: float,
        guidance: float,
        change: float,
        photo: str | None,
        chosen: list[str],
        *values: Any,  # noqa: ANN401 - strengths of all sliders, the words of concepts, and their scales
    ) -> Iterator[tuple[Any, ...]]:
        """Values of the outputs, while the images form."""
        strengths = values[: len(self.slider_tokens)]
        words, scales = values[len(strengths) : -CONCEPTS], values[-CONCEPTS:]
        with messages():
            request = PageRequest(
                prompt=prompt or "",
                seeds=parse_seeds(seeds or "") or (1,),
                tokens={
                    token: strength or 0.0
                    for token, strength in zip(self.slider_tokens, strengths, strict=True)
                    if token in chosen
                },
                concepts={
                    concept.strip(): scale or 0.0
                    for concept, scale in zip(words, scales, strict=True)
                    if (concept or "").strip()
                },
                photo=None if photo is None else Path(photo),
                steps=int(steps),
                guidance=guidance,
                negative_prompt=negative_prompt or "",
                change=change,
            )
            before, after = (_Gallery(self.downloads.new_folder()) for _ in range(2))
            for frame in self.studio.show(request):
                galleries = [
                    gallery.update(images, always=frame.finished)  # a client takes the last answer for all
                    for gallery, images in ((before, frame.before), (after, frame.after))
                ]
                if frame.finished:
                    yield *galleries, "", *self._finished(frame, request)
                else:
                    yield *galleries, f"{frame.status} ...", gr.skip(), gr.skip(), gr.skip()

    def _finished(self, frame: Frame, request: PageRequest) -> tuple[Any, ...]:
        """The judge's opinion, and the buttons that save the images and their config."""
        opinion = opinion_rows(self.studio.opinion(frame.before), self.studio.opinion(frame.after))
        names = (
            [f"seed{seed}" for seed in request.seeds] if request.photo is None else [f"{request.photo.stem}-edited"]
        )
        image = gr.DownloadButton(value=self.downloads.images(frame.after, names), interactive=True)
        try:
            text = self.studio.yaml_of(request)
        except UserError:  # of a photo that is not edited
            config = gr.DownloadButton(value=None, interactive=False)
        else:
            config = gr.DownloadButton(value=self.downloads.text(text, "page.yaml"), interactive=True)
        return opinion, image, config

    def token_file(self, token: str, program: EmbeddingFormat, strength: float | None) -> Any:  # noqa: ANN401
        """The button that saves a token."""
        with messages():
            folder = self.downloads.new_folder()
            factor = 1.0 if strength is None else strength
            return gr.DownloadButton(value=self.studio.token_file(token, folder, format=program, strength=factor))

    def _prompt_hint(self) -> str:
        words = [file.metadata.get("prompt", token) for token, file in self.studio.tokens.items()]
        in_prompts = [word for word in words if " " in word][:6]
        return f"tokens for prompts: {', '.join(f'`{word}`' for word in in_prompts)}" if in_prompts else ""


class _Gallery:
    """Files of the images that a gallery shows, each written once: a browser may still read an earlier one.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[tuple[Image.Image, Path]] = []  # with the images, so that none takes another's place
        self._shown: list[Path] | None = None

    def update(self, images: Sequence[Image.Image], always: bool) -> Any:  # noqa: ANN401 - what Gradio takes
        """Paths of images; or that nothing changes, unless they are always wanted."""
        paths = [self._path(image) for image in images]
        if paths == self._shown and not always:
            return gr.skip()
        self._shown = paths
        return paths

    def _path(self, image: Image.Image) -> Path:
        known = next((path for other, path in self._files if other is image), None)
        if known is None:
            known = self._folder / f"{len(self._files)}.png"
            displayed(image).save(known, compress_level=1)
            self._files.append((image, known))
        return known


def default_sliders(tokens: Mapping[str, EmbeddingFile]) -> list[str]:
    """The tokens with a visible slider at first: of attributes the one that has it, and tokens of unknown kind."""
    fit = [
        token
        for token, file in tokens.items()
        if file.metadata.get("method") != "class_tokens"
        and file.metadata.get("class") == file.metadata.get("attribute", file.metadata.get("class"))
    ]
    return (fit or list(tokens))[:_SHOWN_SLIDERS]


def displayed(image: Image.Image) -> Image.Image:
    """An image at a size for the screen."""
    longest = max(image.size)
    wanted = min(max(longest, _SMALLEST), _LARGEST)
    if wanted == longest:
        return image
    size = [max(1, round(side * wanted / longest)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def opinion_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[list[str]]:
    """Label with its probability before and after, of the labels that the judge sees most."""
    labels = sorted(after, key=lambda label: -max(before.get(label, 0.0), after[label]))[:_SHOWN_LABELS]
    return [[label, f"{before.get(label, 0.0):.0%}", f"{after[label]:.0%}"] for label in labels]


@contextmanager
def messages() -> Iterator[None]:
    """Show errors that the user can correct as messages on the page."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise gr.Error(
            "there is not enough memory; use a smaller photo, or start the page with --dtype bfloat16"
        ) from None
    except UserError as error:
        raise gr.Error(escape(str(error), quote=False), print_exception=False) from None
