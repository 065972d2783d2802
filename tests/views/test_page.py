"""The page in a real browser: what it shows, that it acts, and that it complains of nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from tests.views.browser import Browser, find_chromium
from tests.views.feed import POOLS
from tests.views.served import TOKEN, Served

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
    pytest.mark.timeout(180),
]
DRAWN = "document.querySelectorAll('.chart .load[d]').length == 3"


class Page:
    """A served fleet and a browser that shows it."""

    def __init__(self, served: Served, browser: Browser, url: str) -> None:
        self.served, self.browser, self.url = served, browser, url

    async def show(self, width: int = 1280, scheme: str = "light") -> None:
        await self.browser.view(width, 900, scheme)
        await self.browser.open(self.url)

    async def text(self, selector: str) -> str:
        return str(await self.browser.js(f"document.querySelector({selector!r}).innerText"))


async def run(served: Served) -> AsyncIterator[Page]:
    runner = web.AppRunner(served.app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    assert CHROMIUM is not None
    try:
        async with Browser(CHROMIUM) as browser:
            yield Page(served, browser, f"http://127.0.0.1:{runner.addresses[0][1]}/")
    finally:
        await runner.cleanup()


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    """A fleet after 700 s: one decision waits, one replica is slow."""
    async for found in run(Served(700)):
        yield found


@pytest.fixture
async def empty_page() -> AsyncIterator[Page]:
    """A deployment in which nothing has happened."""
    async for found in run(Served(0)):
        yield found


async def test_it_shows_the_fleet_without_complaint(page: Page) -> None:
    """At both widths and in both schemes: every section is filled, nothing is cut off, the console stays silent."""
    for width in (1280, 400):
        for scheme in ("light", "dark"):
            await page.show(width, scheme)
            await page.browser.until(DRAWN)
            assert await page.browser.js("document.documentElement.scrollWidth - innerWidth") <= 0
            body = await page.text("body")
            for words in (
                *(p.name for p in POOLS),
                "slow replica",
                "waits for you",
                "acme",
                "1.30× by batch-0",
                "hold 300 s x 1.10 + 1",
            ):
                assert words in body
    assert page.browser.complaints == []


async def test_it_follows_what_happens(page: Page) -> None:
    """New records show within seconds, and what a person has opened stays open."""
    await page.show()
    await page.browser.until(DRAWN)
    await page.browser.js("document.querySelector('.item .link').click()")
    await page.browser.until("document.querySelector('.more')?.innerText.includes('It rests on')")
    before = await page.text("#clock-text")
    page.served.advance(40)
    await page.browser.until(f"document.querySelector('#clock-text').innerText != {before!r}")
    await asyncio.sleep(1.2)
    assert await page.browser.js("document.querySelector('.more').hidden") is False
    assert page.browser.complaints == []


async def test_a_person_approves(page: Page) -> None:
    """Approve asks for the token once, says when it is wrong, and orders with comment and name when it is right."""
    browser = page.browser
    await page.show()
    await browser.until(DRAWN)
    await browser.js("document.querySelector('.item.waits button.primary').click()")
    await browser.js("document.querySelector('#order-comment').value = 'go on'")
    await browser.js("document.querySelector('#order-token').value = 'not-the-right-token'")
    await browser.js("document.querySelector('#order-go').click()")
    await browser.until("document.querySelector('#order-error').innerText.includes('not the one')")
    assert not page.served.orders
    await browser.js(f"document.querySelector('#order-token').value = {TOKEN!r}")
    await browser.js("document.querySelector('#order-go').click()")
    await browser.until("!document.querySelector('#order').open")
    assert [(o.command, o.comment) for o in page.served.orders] == [("approve", "go on")]
    await browser.js("document.querySelector('.pool-head button').click()")
    await browser.until("document.querySelector('#order').open")
    assert await browser.js("document.querySelector('#order-token-label').hidden") is True
    await browser.js("document.querySelector('#order-go').click()")
    await browser.until("!document.querySelector('#order').open")
    assert page.served.orders[1].command == "pause"
    assert await browser.js("document.cookie") == ""
    # The browser itself logs the 401 of the wrong token; nothing else may be there.
    assert [c for c in browser.complaints if "401" not in c] == []


async def test_empty_sections_teach(empty_page: Page) -> None:
    """Where there is nothing yet, each section says what would be here and what to do."""
    await empty_page.show()
    await empty_page.browser.until("document.querySelector('#banner').innerText.includes('No record')")
    body = await empty_page.text("body")
    for words in (
        "No pools yet",
        "fleetloop demo",
        "No tenants yet",
        "No nodes yet",
        "No decisions yet",
        "Nothing found",
    ):
        assert words in body
    assert empty_page.browser.complaints == []


async def test_stale_data_is_announced(page: Page) -> None:
    """When records stop, a banner says how old what is shown is, and each pool says so."""
    await page.show()
    await page.browser.until(DRAWN)
    page.served.late_s = 600.0
    await page.browser.until("document.querySelector('#banner').innerText.startsWith('Stale')")
    await page.browser.until("document.querySelector('.pool-head').innerText.includes('old')")
    assert page.browser.complaints == []


async def test_text_of_others_is_never_markup(page: Page) -> None:
    """A finding whose text looks like HTML is shown as text."""
    row = next(iter(page.served.rows.tables["findings"].values()))
    row["text"] = "<img src=x onerror=alert(1)>"
    await page.show()
    await page.browser.until("document.querySelector('#finding-list').innerText.includes('<img src=x')")
    assert await page.browser.js("document.querySelectorAll('#finding-list img').length") == 0
    assert page.browser.complaints == []
