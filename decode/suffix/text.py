"""Compiled functions on the paged text of a suffix tree; see `layout`."""

from decode.suffix.compiled import longs_at, njit, words_at
from decode.suffix.layout import (
    FILL,
    FREE_PAGE,
    GROWS,
    NEXT,
    NUM_PAGES,
    PAGE,
    PAGE_WORDS,
    PAGES,
    PREV,
    TEXT,
    TOKENS,
)


@njit
def push_page(header, pages, previous, slot):
    """A page behind `previous` (-1: none) for the sequence of `slot`; its number."""
    page = header[FREE_PAGE]
    if page >= 0:
        header[FREE_PAGE] = pages[page * PAGE_WORDS + NEXT]
    else:
        page = header[NUM_PAGES]
        header[NUM_PAGES] += 1
    at = page * PAGE_WORDS
    pages[at + NEXT] = -1
    pages[at + PREV] = previous
    pages[at + FILL] = 0
    pages[at + GROWS] = slot
    if previous >= 0:
        pages[previous * PAGE_WORDS + NEXT] = page
        pages[previous * PAGE_WORDS + GROWS] = -1
    return page


@njit
def step(pages, position):
    """The position behind `position`, -1 at the end of its sequence."""
    page = position // PAGE
    if position % PAGE + 1 < pages[page * PAGE_WORDS + FILL]:
        return position + 1
    if position % PAGE + 1 < PAGE:
        return -1
    following = pages[page * PAGE_WORDS + NEXT]
    if following < 0 or pages[following * PAGE_WORDS + FILL] == 0:
        return -1
    return following * PAGE


@njit
def forward(pages, position, count):
    """`count` positions on, -1 where the sequence ends before."""
    while count > 0:
        inside = PAGE - 1 - position % PAGE
        if count <= inside:
            position += count
            if position % PAGE >= pages[position // PAGE * PAGE_WORDS + FILL]:
                return -1
            return position
        following = pages[position // PAGE * PAGE_WORDS + NEXT]
        if following < 0 or pages[following * PAGE_WORDS + FILL] == 0:
            return -1
        position = following * PAGE
        count -= inside + 1
    return position


@njit
def back(pages, position, count):
    """`count` positions back, in the same sequence."""
    while count > position % PAGE:
        count -= position % PAGE + 1
        position = pages[position // PAGE * PAGE_WORDS + PREV] * PAGE + PAGE - 1
    return position - count


@njit
def release_pages(address, first):
    """Give back the pages of a sequence that nothing refers to any more."""
    header = longs_at(address)
    pages = words_at(header[PAGES])
    page = first
    while page >= 0:
        following = pages[page * PAGE_WORDS + NEXT]
        pages[page * PAGE_WORDS + NEXT] = header[FREE_PAGE]
        header[FREE_PAGE] = page
        page = following


@njit
def ends_with(header, last_page, tokens):
    """Whether the sequence whose last page this is ends with `tokens` [n]."""
    if last_page < 0:
        return len(tokens) == 0
    text = words_at(header[TEXT])
    pages = words_at(header[PAGES])
    page = last_page
    at = page * PAGE + pages[page * PAGE_WORDS + FILL] - 1
    for index in range(len(tokens) - 1, -1, -1):
        if at < page * PAGE:
            page = pages[page * PAGE_WORDS + PREV]
            if page < 0:
                return False
            at = page * PAGE + PAGE - 1
        if text[at] != tokens[index]:
            return False
        at -= 1
    return True


@njit
def push_token(header, text, pages, last_page, slot, token):
    """Write a token behind the sequence that ends in `last_page`; its position."""
    page = last_page
    if page < 0 or pages[page * PAGE_WORDS + FILL] == PAGE:
        page = push_page(header, pages, page, slot)
    position = page * PAGE + pages[page * PAGE_WORDS + FILL]
    text[position] = token
    pages[page * PAGE_WORDS + FILL] += 1
    header[TOKENS] += 1
    return position
