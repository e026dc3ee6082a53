"""Messages to tokens and back. Nothing else in Veneer knows a chat template."""

from veneer.render.renderer import Renderer, load_renderer

__all__ = ["Renderer", "load_renderer"]
