"""`draftsmith compare`: the runs of a sweep beside each other, on one page."""

import json
from dataclasses import dataclass
from pathlib import Path

from distill.config import command
from distill.errors import UserError
from distill.report.curves import markdown, page
from distill.run_folder import SETTINGS, write_text
from distill.runs import Run, grouped

PAGE, TABLE = "compare.html", "compare.md"


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put the trainings below a folder into one table, with their curves.

    Attributes:
        folder: of a `draftsmith train --multirun`, or any with run folders in it.
        title: of the page.
    """

    folder: Path
    title: str = "Trainings compared"

    def run(self) -> Path:
        """Write compare.html and compare.md into the folder; returns the page.

        Raises:
            UserError: no training is there.
        """
        runs = [Run(path) for path in trainings(self.folder)]
        if not runs:
            raise UserError(
                "there is no run of draftsmith train",
                self.folder,
                "name the output folder of draftsmith train --multirun",
            )
        groups = grouped(runs)
        write_text(self.folder / PAGE, page(self.title, self.folder, groups))
        text = markdown(groups)
        write_text(self.folder / TABLE, text)
        print(f"{text}\n{self.folder / PAGE}")
        return self.folder / PAGE


def trainings(folder: Path) -> list[Path]:
    """Run folders of `draftsmith train` in or below `folder`, by the numbers in their names."""
    found = [
        path.parent
        for path in folder.rglob(SETTINGS)
        if json.loads(path.read_text())["settings"].get("type") == "Train"
    ]
    return sorted(found, key=lambda path: [(len(part), part) for part in path.parts])


main = command("compare", Compare)

if __name__ == "__main__":
    main()
