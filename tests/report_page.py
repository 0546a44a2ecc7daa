"""The page of a report, taken apart for tests."""

from __future__ import annotations

import re
from html.parser import HTMLParser

HOSTILE = '</title><script>alert(1)</script><img src=x onerror="alert(2)"> & "quotes\''
"""A caption that would like to be code."""


class Page(HTMLParser):
    """Tags, the rows of its tables, and its tables: caption -> {name: (length of its bar in percent, value)}."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.tables: dict[str, dict[str, tuple[float, str]]] = {}
        self._within = ""
        self._share = 0.0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("i", "div") and (found := re.search(r"--share:([\d.]+)%", dict(attrs).get("style") or "")):
            self._share = float(found[1])
        self._within = tag

    def handle_data(self, data: str) -> None:
        if self._within == "caption":
            self.tables[data.strip()] = {}
        elif self._within in ("th", "td") and self.rows:
            self.rows[-1].append(data)
        self._within = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr" and len(self.rows[-1]) == 2:
            name, value = self.rows[-1]
            [*self.tables.values()][-1][name] = (self._share, value)

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]
