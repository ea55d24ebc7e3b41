"""The command ``tokenlearn page``: sliders for tokens and concepts in a browser, on any model.

``Studio`` does what the page offers and knows no browser; ``layout`` shows it by Gradio.
"""

from tokenlearn.page.drawing import Frame
from tokenlearn.page.request import PageRequest
from tokenlearn.page.studio import Studio

__all__ = ["Frame", "PageRequest", "Studio"]
