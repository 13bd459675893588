"""LoFA for ComfyUI: the entry point that ComfyUI looks for. Imports happen when it is called, not before."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """The extension with all LoFA nodes (ComfyUI's V3 interface)."""
    from .nodes import LoFAExtension

    return LoFAExtension()
