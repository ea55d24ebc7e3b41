"""The command ``tokenlearn page``."""

from __future__ import annotations

import ipaddress
import socket
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch

from tokenlearn.errors import UserError, reason_of
from tokenlearn.models import TimmClassifier
from tokenlearn.models.frozen import Precision
from tokenlearn.notices import notice
from tokenlearn.page.request import PageRequest
from tokenlearn.page.studio import Studio
from tokenlearn.paths import resolve
from tokenlearn.pipeline import Pipeline
from tokenlearn.stopping import Stopped
from tokenlearn.tokens import Embeddings

if TYPE_CHECKING:
    import gradio as gr

BUNDLED = "checkpoints/portraits"
BUNDLED_TOKENS = ["checkpoints/attribute_tokens", "checkpoints/class_tokens"]
BUNDLED_JUDGE = "checkpoints/attribute_judge"
_LARGEST_UPLOAD = "50mb"


def page(
    pretrained: str = BUNDLED,
    *,
    embeddings: Embeddings | Literal["bundled"] | None = "bundled",
    judge: str | None = "bundled",
    prompt: str = "a portrait of a person",
    seeds: list[int] = [6],  # noqa: B006 - read only; a list is what YAML shows
    steps: int = 20,
    guidance: float = 4.0,
    dtype: Precision = "float32",
    device: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
) -> None:
    """Open a page with sliders for tokens and concepts, on this computer, until Ctrl-C.

    Args:
        pretrained: folder of a diffusers pipeline, or hub id.
        embeddings: embedding files of the tokens: a folder or a file, a list of both, or token to file; ``bundled`` is
            those of the bundled model, and none for another model; null is none.
        judge: timm name or folder of a classifier whose opinion is shown; ``bundled`` is the one of the bundled model,
            and none for another model; null is none.
        prompt: prompt that the page begins with.
        seeds: seeds that it begins with.
        steps: sampling steps that it begins with.
        guidance: scale of classifier-free guidance that it begins with.
        dtype: precision of the model.
        device: device of the model, such as ``cuda``; null for a GPU if there is one.
        host: address to listen at. Everybody who can reach another one than this computer's can use the page.
        port: port to listen at.
        open_browser: whether to open the page in a browser.

    Raises:
        UserError: if Gradio is not installed, the port is taken, the model or a file cannot be loaded, or a value is
            out of bounds.
    """
    require_gradio()
    first = PageRequest(prompt=prompt, seeds=tuple(seeds), steps=steps, guidance=guidance)
    require_free_port(host, port)
    from tokenlearn.page import layout  # needs gradio

    is_bundled = resolve(pretrained) == resolve(BUNDLED)
    tokens = (BUNDLED_TOKENS if is_bundled else None) if embeddings == "bundled" else embeddings
    judged_by = (BUNDLED_JUDGE if is_bundled else None) if judge == "bundled" else judge
    place = _device(device)
    pipeline = Pipeline.from_pretrained(pretrained, dtype=dtype)
    pipeline.backbone.to(place)
    classifier = None if judged_by is None else TimmClassifier(judged_by).to(place)
    studio = Studio(pipeline, embeddings=tokens, judge=classifier)
    blocks = layout.build(studio, first, title=f"tokenlearn on {pretrained}")
    serve(blocks, host, port, open_browser=open_browser)
    try:
        _wait_until_stopped()
    finally:
        blocks.close(verbose=False)


def serve(blocks: gr.Blocks, host: str, port: int, *, open_browser: bool = False) -> str:
    """Serve a page from a thread, to this computer alone unless the address says otherwise, and print where.

    Args:
        blocks: the page.
        host: address to listen at.
        port: port to listen at.
        open_browser: whether to open the page in a browser.

    Returns:
        The address of the page.

    Raises:
        UserError: if the port is taken.
    """
    from tokenlearn.page import layout

    if not _is_loopback(host):
        notice(f"everybody who can reach {host}:{port} can use this page")
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=_LARGEST_UPLOAD,
            ssr_mode=False,
            footer_links=["api"],
            theme=layout.theme(),
            css=layout.CSS,
        )
    except OSError:  # taken since it was looked at
        raise _port_taken(host, port) from None
    print(address, flush=True)
    return str(address)


def require_gradio() -> None:
    """Refuse to go on without Gradio.

    Raises:
        UserError: naming the extra that installs it.
    """
    if find_spec("gradio") is None:
        raise UserError(
            "the page needs the package 'gradio', which is not installed; run 'uv sync --extra page' in the "
            "repository, or pip install 'tokenlearn-diffusion[page]'"
        )


def require_free_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at, before the model is loaded.

    Raises:
        UserError: naming the option to change.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port must be from 1 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"there is no address '{host}' ({error.strerror}); correct --host") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise _port_taken(host, port, reason_of(error)) from None


def _port_taken(host: str, port: int, reason: str = "Address already in use") -> UserError:
    return UserError(f"cannot listen at {host}:{port} ({reason}); choose another port by --port, such as {port + 1}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(
            f"there is no device '{device}' here ({reason_of(error)}); use cpu, or leave --device out"
        ) from None
    return device


def _wait_until_stopped() -> None:
    try:
        threading.Event().wait()
    except Stopped as stopped:
        raise Stopped(stopped.received, "the page is closed") from None
