"""``stage1 help``: the manual's pages."""

from __future__ import annotations

from importlib.resources import files

from stage1_pro.command import Command, Result, option
from stage1_pro.commands import outside
from stage1_pro.errors import InputError, nearest


def topics() -> dict[str, str]:
    """Every page's text by its name."""
    pages = sorted((files("stage1_pro") / "manual").iterdir(), key=lambda page: page.name)
    return {page.name.removesuffix(".md"): page.read_text("utf-8") for page in pages if page.name.endswith(".md")}


class Help(Command):
    """Print a page of the manual, or the list of pages."""

    subject: str | None = option(None, "which page; all are listed by default", positional=True, metavar="TOPIC")

    def execute(self) -> Result:
        """Print the page as it is: Markdown that reads as plain text."""
        pages = topics()
        if self.subject is None:
            width = max(map(len, pages))
            titles = {name: text.partition("\n")[0].lstrip("# ") for name, text in pages.items()}
            lines = [f"  {name:<{width}}  {title}" for name, title in titles.items()]
            more = [f"  {name}" for name in outside()]
            text = "\n".join(["pages of the manual (stage1 help TOPIC):", *lines])
            return Result(text + ("\n\ncommands of other packages:\n" + "\n".join(more) if more else ""), titles)
        if self.subject not in pages:
            raise InputError(
                f"TOPIC must be one of {', '.join(pages)}, got '{self.subject}'{nearest(self.subject, pages)}"
            )
        return Result(pages[self.subject].rstrip(), {"topic": self.subject, "text": pages[self.subject]})
