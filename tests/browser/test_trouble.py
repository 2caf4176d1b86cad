"""What is set wrongly or out of reach is a sentence on a page that stands, never a stack trace."""

from collections.abc import Callable
from pathlib import Path

import hub
import pytest
import small_disk
import space
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.docker]

SECRET = "hf_verysecretvalue"


def shown(visit: Callable[..., Page], url: str, *, locale: str = "en-GB") -> Page:
    """The page, once it says what is wrong; nothing of it may look like Python."""
    page = visit(url, locale=locale)
    page.wait_for_selector("#failure .failure")
    text = page.locator("body").inner_text()
    assert "Traceback" not in text
    assert SECRET not in text
    return page


def test_a_setting_that_cannot_be_read_names_itself_and_the_page_stands(
    cpu: dict[str, str], home: Path, visit: Callable[..., Page]
) -> None:
    with space.serving(home, **cpu, n_ctx="lots", SPACE_ID="someone/translator") as served:
        page = shown(visit, served.url)
        link = page.locator("#failure").get_by_role("link", name="Open the settings of this Space")
        address = "https://huggingface.co/spaces/someone/translator/settings"
        expect(link).to_have_attribute("href", address)
        expect(page.locator("#failure")).to_contain_text("YAKULINGO_SPACES_N_CTX is 'lots'")
        expect(page.locator("#failure")).to_contain_text("a number of tokens from 16")
        page.locator("#source textarea").fill("猫")
        page.locator("#go").click()
        expect(page.locator("#status .failure")).to_contain_text("SETTING_INVALID")
        page.locator("#owners").click()
        page.locator("#examine").click()
        page.wait_for_selector("#report textarea")
        assert "FAIL settings" in page.locator("#report textarea").input_value()
        japanese = shown(visit, served.url, locale="ja-JP").locator("#failure")
        expect(japanese.locator(".what")).to_have_text("使えない設定値があります。")
        expect(japanese.locator("details p")).to_contain_text("YAKULINGO_SPACES_N_CTX is 'lots'")
        assert "Traceback" not in served.said()


def test_a_gated_model_without_a_token_says_where_to_put_one(
    cpu: dict[str, str], home: Path, visit: Callable[..., Page]
) -> None:
    locked = hub.Hub(files={"m.gguf": b"GGUF"}, token=SECRET)
    named = {"gguf_repo_id": locked.repo, "gguf_filename": "m.gguf"}
    with hub.serving(locked), space.serving(home, **cpu, **named, HF_ENDPOINT=locked.url) as served:
        page = shown(visit, served.url)
        expect(page.locator("#failure")).to_contain_text("MODEL_GATED")
        expect(page.locator(".advice")).to_contain_text("HF_TOKEN")
        expect(page.locator("#retry")).to_be_visible()
        assert "Traceback" not in served.said()


def test_a_file_that_the_repository_lacks_is_named_and_trying_again_finds_it(
    cpu: dict[str, str], home: Path, real_model: Path, visit: Callable[..., Page]
) -> None:
    empty = hub.Hub(token=SECRET)
    named = {"gguf_repo_id": empty.repo, "gguf_filename": "m.gguf"}
    with (
        hub.serving(empty),
        space.serving(home, **cpu, **named, HF_ENDPOINT=empty.url, HF_TOKEN=SECRET) as served,
    ):
        page = shown(visit, served.url)
        expect(page.locator("#failure")).to_contain_text("has no file m.gguf")
        empty.files["m.gguf"] = real_model.read_bytes()
        page.locator("#retry").click()
        page.wait_for_selector(".pill.ready")
        expect(page.locator("#failure .failure")).to_have_count(0)
        assert SECRET not in served.said()


def test_a_full_disk_is_a_sentence_and_once_there_is_room_it_goes_on(
    cpu: dict[str, str], real_model: Path, tmp_path: Path, visit: Callable[..., Page]
) -> None:
    """First the runtime finds no room, then the model; the page stands all the while."""
    here = hub.Hub(files={"m.gguf": real_model.read_bytes()})
    named = {"gguf_repo_id": here.repo, "gguf_filename": "m.gguf", "max_new_tokens": "8"}
    few = {"n_ctx": "512", "HF_HUB_DISABLE_XET": "1"}
    place = tmp_path / "disk"
    with (
        small_disk.mounted(place, "8m") as resize,
        hub.serving(here),
        space.serving(
            tmp_path / "home", **cpu, **named, **few, HF_ENDPOINT=here.url, HF_HOME=str(place)
        ) as served,
    ):
        page = shown(visit, served.url)
        for size in ("64m", "300m"):
            expect(page.locator("#failure .code")).to_have_text("DISK_FULL")
            expect(page.locator("#failure")).to_contain_text(str(place))
            expect(page.locator("#failure")).to_contain_text("free some space and try again")
            page.locator("#source textarea").fill("猫")
            page.locator("#go").click()
            expect(page.locator("#status .failure .code")).to_have_text("DISK_FULL")
            resize(size)
            page.locator("#retry").click()
            page.locator("#retry").wait_for(state="detached")  # the failure before this one is gone
            page.wait_for_selector(".pill.ready, .pill.failed")
        page.wait_for_selector(".pill.ready")
        expect(page.locator("#failure .failure")).to_have_count(0)
        page.locator("#go").click()
        page.wait_for_selector(".status.done")
        assert "Traceback" not in served.said()


def test_without_a_gpu_the_doctor_answers_both_chapters_with_the_setting(
    cpu: dict[str, str], home: Path, real_model: Path, visit: Callable[..., Page]
) -> None:
    refused = {**cpu, "allow_cpu": "0"}
    with space.serving(home, **refused, gguf_path=str(real_model)) as served:
        page = shown(visit, served.url)
        page.locator("#owners").click()
        page.locator("#examine").click()
        page.wait_for_selector("#report textarea")
        advised = page.locator("#advice").inner_text()
    assert "YAKULINGO_SPACES_ALLOW_CPU=1" in advised
    assert "ZeroGPU" in advised
