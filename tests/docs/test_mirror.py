"""The tests of a module are in the file of its name; what is tested elsewhere is listed here."""

import pytest
from verbs import PROJECT

ELSEWHERE = {
    "dispatch": "many hosts: tests/integration/test_dask_engine.py",
    "scheduler": "many hosts: tests/integration/test_dask_engine.py",
    "inventory": "Docker's images: tests/farm/test_images.py and tests/integration/test_spine.py",
    "shared_cache": "real servers: tests/integration/test_shared_cache.py",
    "options": "what verbs accept: tests/farm/test_cli.py",
    "release_verbs": "whole verbs: tests/farm/test_own_space.py and tests/farm/test_cli.py",
    "build_record": "a record and its verb: tests/farm/test_rebuild.py",
    "concurrency": "a start in the background: tests/loader/test_loader.py",
    "report": "what the doctor prints: tests/loader/test_doctor.py",
    "store_folder": "the store and its folder: tests/loader/test_store.py",
    "worker": "a fork with a GPU: tests/space/test_engine.py and tests/integration/test_zerogpu.py",
    "page": "in a browser: tests/browser/test_page.py",
}
BEHAVIOURS = {
    "cpu_variants": "CMake builds the variants that a person names",
    "cut_off": "packing, publishing and promoting are cut off at every effect",
    "rebuild": "the whole verb `invoke rebuild`",
    "cuda_runtime_choice": "selection, loader and store bring CUDA's libraries to a server",
    "driver": "NVML as a library in C, which needs a compiler: tests/rigs/pythons.py has none",
    "fuzz": "every parser of bytes from outside",
    "resume": "another process resumes a download, from another mirror",
    "server_restarts": "a server that ends is started again",
    "space": "the front matter and the requirements of the Space",
    "sentences": "sentences_ja.json has every code of loader and page",
}


@pytest.mark.parametrize("package", ["farm", "llama_loader", "llama_space", "translator"])
def test_module_has_a_test_file_of_its_name_or_a_listed_reason(package: str) -> None:
    source = PROJECT / (package if package == "farm" else f"spaces/{package}")
    modules = {path.stem.strip("_") for path in source.rglob("*.py")} - {"init"}
    tests = (PROJECT / "tests" / package.removeprefix("llama_")).rglob("test_*.py")
    names = {path.stem.removeprefix("test_") for path in tests}
    assert modules - names - ELSEWHERE.keys() == set()
    assert names - modules - BEHAVIOURS.keys() == set()
    assert names & ELSEWHERE.keys() == set()
