"""Make the studies and put their pages, pictures and numbers into docs/studies, and the article that rests on them into docs/article.md:
some hours of two CPU cores.

    make studies     # or: python recipes/studies.py rank --seeds 8

Runs are kept in $VENEER_HOME/studies, so what was interrupted goes on, and more seeds make only what is missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from pages import ROOT, machine, veneer
from veneer.store.files import veneer_home
from veneer.studies.article import article
from veneer.studies.catalogue import DOCUMENT, PAGE, PICTURE, STUDIES

TARGET = ROOT / "docs/studies"


def publish(name: str, folder: Path) -> None:
    """Put a study that was made under docs/studies."""
    TARGET.mkdir(exist_ok=True)
    shutil.copyfile(folder / PICTURE, TARGET / f"{name}.svg")
    shutil.copyfile(folder / DOCUMENT, TARGET / f"{name}.json")
    page = (folder / PAGE).read_text().rstrip()
    (TARGET / f"{name}.md").write_text(f"{page}\n\n![the study as a picture]({name}.svg)\n\nWritten by `make studies`. {machine()}.\n")


def write_article() -> None:
    """From all studies under docs/studies, whenever they were made."""
    documents = [json.loads(path.read_text()) for path in sorted(TARGET.glob("*.json"))]
    (ROOT / "docs/article.md").write_text(article(documents, lambda name: (f"studies/{name}.md", f"studies/{name}.svg")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(STUDIES), metavar="NAME", help=f"of {', '.join(STUDIES)}; all, unless given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--choice-seeds", type=int, default=2)
    args = parser.parse_args()
    for name in args.names:
        terms = ("--seeds", args.seeds, "--choice-seeds", args.choice_seeds)
        publish(name, Path(veneer(veneer_home(), "study", "run", name, *terms)["folder"]))
        write_article()


if __name__ == "__main__":
    main()
