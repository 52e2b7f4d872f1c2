"""docs/walkthrough.ipynb: its cells run from top to bottom, and the page in the repository is the result of a run."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

BOOK = ROOT / "docs" / "walkthrough.ipynb"


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_the_committed_page_is_a_whole_run():
    book = nbformat.read(BOOK, 4)
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}  # no warning
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert not re.search(r"/(home|root|tmp|work|usr)/", text)


def test_every_equation_of_the_method_is_named():
    text = "\n".join(cell.source for cell in nbformat.read(BOOK, 4).cells)
    assert {int(n) for n in re.findall(r"Eq\. (\d+)", text)} >= {1, 2, 3, 4, 6, 7, 8, 9, 12, 13}


@pytest.mark.slow
def test_every_cell_runs():
    committed, book = nbformat.read(BOOK, 4), nbformat.read(BOOK, 4)
    for cell in code_cells(book):
        cell.outputs = []
    NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(BOOK.parent)}}
    ).execute()
    assert [pictures(cell) for cell in code_cells(book)] == [pictures(cell) for cell in code_cells(committed)]
    assert sum(map(pictures, code_cells(book))) > 8
