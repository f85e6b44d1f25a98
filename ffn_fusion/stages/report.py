"""`report`: the records of the other stages as one self-contained HTML page."""

from pathlib import Path

from ffn_fusion.errors import UserError
from ffn_fusion.folder import write_atomically
from ffn_fusion.page.gather import read_all
from ffn_fusion.page.render import render


def report(*folders: Path, out: Path) -> Path:
    """Draw the records of finished stages as one HTML page that needs no network.

    Parameters
    ----------
    folders
        Folders of finished stages, or folders that hold such folders.
    out
        The page to write, a name that ends in .html; an older page there is replaced.

    Returns
    -------
    Path
        The page.
    """
    if out.suffix != ".html" or out.is_dir():
        raise UserError(f"{out} is no name for a page; choose an --out that ends in .html")
    page = render(read_all(folders))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    return out
