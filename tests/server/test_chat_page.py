"""The chat page: what is served without a key, and the page itself in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from importlib import resources
from typing import Any

import httpx
import pytest

from octavo.server.access import Keys
from octavo.server.chat_page import PAGE_FILES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_every_file_is_served_and_none_else(fake) -> None:
    folder = resources.files("octavo.server") / "page"
    for path, name in PAGE_FILES.items():
        answer = fake.client.get(path)
        assert answer.status_code == 200
        assert answer.content == (folder / name).read_bytes()
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
    for path in ("/page/", "/page/../app.py", "/page/%2e%2e/app.py", "/page/vendor/README.md", "/index.html"):
        assert fake.client.get(path).status_code == 404
    assert fake.client.post("/").status_code == 405


def test_the_page_asks_for_what_is_served_and_has_nothing_inline(fake) -> None:
    html = fake.client.get("/").text
    assert re.findall(r'(?:src|href)="(page/[^"]+)"', html) == ["page/style.css", "page/main.js"]
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", html)
    for path in PAGE_FILES:
        if path.endswith(".js") and "vendor" not in path:
            for imported in re.findall(r'from "\./([^"]+)"', fake.client.get(path).text):
                assert f"/page/{imported}" in PAGE_FILES


def test_it_is_open_where_the_api_is_not(serving, api_key) -> None:
    with serving(keys=Keys([api_key])) as harness:
        assert harness.client.get("/").status_code == 200
        assert harness.client.get("/page/main.js").status_code == 200
        assert harness.client.get("/v1/models").status_code == 401
        assert httpx.get(f"{harness.url}/", headers={"host": "evil.example"}).status_code in (200, 403)


# --- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


class Page:
    """A tab on the chat page. Any error or message on its console fails the test."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.tab = browser.new_context(**context).new_page()
        self.tab.set_default_timeout(15_000)
        self.said: list[str] = []
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("dialog", lambda dialog: dialog.accept())
        self.tab.goto(url)

    def ask(self, text: str) -> None:
        self.tab.fill("#prompt", text)
        self.tab.press("#prompt", "Enter")

    def answer(self) -> Any:
        self.tab.wait_for_selector("text=Regenerate")
        return self.tab.locator(".message.assistant").last

    def expect_noted(self, status: str) -> None:
        """The browser itself notes a request that failed."""
        assert any(status in line for line in self.said)
        self.said = [line for line in self.said if status not in line]

    def close(self) -> None:
        self.tab.context.close()
        assert self.said == []


@pytest.fixture
def page(browser: Any, fake: Any) -> Iterator[Page]:
    opened = Page(browser, fake.url)
    yield opened
    opened.close()


def test_an_answer_streams_and_says_how_fast(page: Page) -> None:
    page.ask("Say **this** again")
    answer = page.answer()
    assert answer.locator("strong").first.inner_text() == "this"
    facts = answer.locator(".facts").inner_text()
    assert re.search(r"[\d.]+ tokens/s . first token after [\d.]+ s . \d+ tokens in, \d+ out", facts)
    status = page.tab.inner_text("#status")
    assert "fake" in status
    assert "1 MiB planned" in status
    assert "512 tokens of context" in status


def test_html_in_an_answer_does_nothing(page: Page) -> None:
    """The fake model answers with its prompt: whatever is asked comes back as Markdown."""
    attacks = [
        "<img src=x onerror=\"document.title='owned'\">",
        "<script>document.title='owned'</script>",
        "<svg onload=\"document.title='owned'\"></svg>",
        "[a](javascript:document.title='owned')",
        "<a href=\"javascript:document.title='owned'\">b</a>",
        "![c](http://127.0.0.1:9/leak.png)",
        "<form action=/><input></form><style>body{display:none}</style><iframe src=/></iframe>",
    ]
    page.ask("\n\n".join(attacks))
    body = page.answer().locator(".body")
    assert body.locator("img, script, svg, form, input, style, iframe, [onerror], [onload]").count() == 0
    for link in body.locator("a").all():
        assert not (link.get_attribute("href") or "").startswith("javascript:")
        link.evaluate("element => element.removeAttribute('target')")
    assert page.tab.title() == "Octavo"


def test_stop_regenerate_and_what_is_kept(page: Page) -> None:
    page.ask("!slow:50 " + "one two three " * 20)
    page.tab.wait_for_selector(".message.assistant.writing .body:has-text('one')")
    page.tab.click("#stop")
    assert page.answer().locator(".facts").inner_text() == "stopped"
    page.ask("second")
    page.answer()
    page.tab.click("#new")
    page.ask("another conversation")
    page.answer()
    page.tab.click("text=Regenerate")
    page.answer()
    page.tab.reload()
    assert page.tab.locator("#conversations li").count() == 2
    page.tab.locator("#conversations button.open").last.click()
    assert page.tab.locator(".message.user").count() == 2
    with page.tab.expect_download() as download:
        page.tab.click("#export")
    assert "second" in download.value.path().read_text(encoding="utf-8")
    page.tab.locator("#conversations li.current button").last.click()
    assert page.tab.locator("#conversations li").count() == 1


def test_settings_reach_the_model(page: Page) -> None:
    page.tab.click("#options-toggle")
    page.tab.fill("#system", "Be terse.")
    page.tab.fill("#max_tokens", "5")
    with page.tab.expect_request("**/v1/chat/completions") as sent:
        page.ask("Hi")
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be terse."}
    assert body["max_tokens"] == 5
    assert "temperature" not in body
    assert "cut at the length limit" in page.answer().locator(".facts").inner_text()


def test_by_keyboard_alone(page: Page) -> None:
    """The link that skips to the message box, Enter sends, Escape stops; every control has a name."""
    page.tab.locator(".skip").focus()
    page.tab.keyboard.press("Enter")
    page.tab.keyboard.type("!slow:50 " + "a b c " * 30)
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_selector(".message.assistant.writing")
    page.tab.keyboard.press("Escape")
    page.answer()
    unnamed = page.tab.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')].filter(e => "
        "!(e.innerText || e.getAttribute('aria-label') || e.labels?.length)).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, fake: Any, scheme: str) -> None:
    page = Page(browser, fake.url, viewport={"width": 360, "height": 640}, color_scheme=scheme)
    page.ask("`" + "x" * 90 + "`\n\n| a | b |\n|---|---|\n| " + "y" * 80 + " | z |")
    page.answer()
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert not page.tab.is_visible("#new")
    page.tab.click("#menu")
    assert page.tab.is_visible("#new")
    page.close()


def test_it_asks_for_a_key_where_one_is_needed(browser: Any, serving: Any, api_key: str) -> None:
    with serving(keys=Keys([api_key])) as harness:
        page = Page(browser, harness.url)
        page.tab.fill("#key", "a-wrong-key-entirely")
        page.tab.click("text=Use this key")
        page.tab.wait_for_selector("text=The key was not taken")
        page.tab.fill("#key", api_key)
        page.tab.click("text=Use this key")
        page.ask("Hi")
        page.answer()
        page.expect_noted("401")
        page.close()


def test_an_error_is_said_and_nothing_is_lost(page: Page) -> None:
    page.ask("!nan")
    page.tab.wait_for_selector("#error:not([hidden])")
    assert "The server says" in page.tab.inner_text("#error")
    assert page.tab.locator(".message.user").count() == 1
    assert page.tab.is_visible("text=Answer this")
    page.expect_noted("500")
