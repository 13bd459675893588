"""The command line's looks: help in colour, errors in one line."""

import argparse
import sys
from typing import NoReturn

try:
    from rich.console import Console
    from rich.highlighter import RegexHighlighter
    from rich.text import Text
    from rich.theme import Theme
except ImportError as error:  # ComfyUI's Python has no rich
    sys.exit(f"error: the command line needs the package {error.name}: pip install rich pillow")

THEME = Theme({"help.option": "cyan", "help.heading": "bold", "help.value": "green"})


class _HelpColours(RegexHighlighter):
    base_style = "help."
    highlights = [
        r"(?P<option>(?<![\w-])--?[a-z][a-z-]*)",
        r"(?m)^(?P<heading>[a-z][a-z ]*:)",
        r"(?P<value>\b[A-Z]{3,}\b)",
    ]


class Parser(argparse.ArgumentParser):
    """argparse, its help in colour and its errors in the same shape as ours."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.color = False  # Python 3.14's own colours would clash with these

    def print_help(self, file=None) -> None:
        console = Console(file=file, theme=THEME, highlighter=_HelpColours(), soft_wrap=True)
        console.print(self.format_help(), markup=False)

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        sys.exit(2)


def complain(message: str) -> None:
    """One line on standard error."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), " ".join(message.split())))
