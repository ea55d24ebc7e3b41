"""A node pack for ComfyUI: link this folder into ComfyUI's ``custom_nodes``.

Written for ComfyUI 0.38.1. tokenlearn has to be installed in ComfyUI's Python; of its packages the nodes use
``guidance`` alone, which needs torch and nothing else.
"""

from tokenlearn.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
