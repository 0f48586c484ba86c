"""The cache of compiled files: nothing is made twice, and nothing stale is used."""

from __future__ import annotations

import pytest

from . import build_cache


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A source that includes a header; `make` copies both and counts its calls."""
    monkeypatch.setattr(build_cache, "BUILD", tmp_path / "build")
    source, header = tmp_path / "kernel source.cu", tmp_path / "kernel.cuh"
    source.write_text("source 1\n")
    header.write_text("header 1\n")
    calls = []

    def make(product, depfile):
        calls.append(product)
        product.write_text(source.read_text() + header.read_text())
        escaped = str(source).replace(" ", "\\ ")
        depfile.write_text(f"a.o: {escaped} \\\n  {header}\nb.o: {header}\n")  # two rules

    def build(key="flags"):
        return build_cache.build("kernel", [key], ".so", make).read_text()

    return source, header, calls, build


def test_a_product_is_made_once_for_each_content(project):
    source, header, calls, build = project
    assert build() == build() == "source 1\nheader 1\n"
    assert len(calls) == 1
    header.write_text("header 2\n")
    assert build() == "source 1\nheader 2\n" and len(calls) == 2
    source.write_text("source 2\n")
    assert build() == "source 2\nheader 2\n" and len(calls) == 3
    header.write_text("header 1\n")
    source.write_text("source 1\n")
    assert build() == "source 1\nheader 1\n" and len(calls) == 3  # still there


def test_other_flags_are_another_product(project):
    _, _, calls, build = project
    build("-O1")
    build("-O2")
    assert len(calls) == 2


def test_a_vanished_source_is_looked_for_by_the_compiler(project):
    source, _, calls, build = project
    build()
    source.unlink()
    with pytest.raises(FileNotFoundError):
        build()
    assert len(calls) == 2


def test_an_edit_during_the_compilation_makes_it_start_again(project, monkeypatch):
    _, _, calls, build = project
    times = iter([0.0, 2e12])  # the first attempt began before the sources were written
    monkeypatch.setattr(build_cache.time, "time", lambda: next(times))
    build()
    assert len(calls) == 2
