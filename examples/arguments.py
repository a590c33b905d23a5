"""Arguments of commands, refused before all the work if they could only fail after it."""

import argparse
import os
from pathlib import Path


def figure_path(text: str) -> Path:
    """Of a file to write, with a suffix that matplotlib writes."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        message = 'the figure needs matplotlib: pip install "eqx-norms[examples]"'
        raise argparse.ArgumentTypeError(message) from None
    known = [*FigureCanvasBase.get_supported_filetypes()]
    known.remove("pgf")  # which needs LaTeX
    path = Path(text)
    if path.suffix.lower().removeprefix(".") not in known:
        raise argparse.ArgumentTypeError(f"a figure ends in .{', .'.join(known)}; got {text!r}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"a figure is a file, and {text!r} is a directory")
    folder_path(path.parent)
    return path


def folder_path(text: str | Path) -> Path:
    """Of a directory that is there and can be written to, or can be made."""
    path = Path(text)
    there = next(
        parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists()
    )
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file, not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written to")
    return path
