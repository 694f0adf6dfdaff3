"""Fail if a built site has a link that leads nowhere, or loads anything from outside.

    python scripts/check_links.py _site

Links to other sites are read, not followed.
"""
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("img", "srcset"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("audio", "src"), ("embed", "src"), ("object", "data")}
LOADED_RELS = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "icon", "manifest"}


class Page(HTMLParser):
    "The ids of a page, and what it points to: (address, whether it is loaded)."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"): self.ids.append(attrs["id"])
        if tag == "a" and attrs.get("name"): self.ids.append(attrs["name"])
        for name in ("href", "src", "srcset", "data"):
            if attrs.get(name) is None or tag == "base" or (tag, name) == ("link", "data"): continue
            loaded = (tag, name) in LOADED or tag == "link" and bool(LOADED_RELS & set(attrs.get("rel", "").split()))
            if tag in ("a", "link", "area") or (tag, name) in LOADED: self.links.append((attrs[name].strip(), loaded))


def check_outside(address, loaded):
    "What is wrong with an address that leaves the site, or None."
    if loaded: return "is loaded from outside"
    try: parts = urlsplit(address); parts.port
    except ValueError as e: return f"is no address ({e})"
    if parts.scheme == "mailto": return None if "@" in parts.path else "is no mail address"
    if parts.scheme not in ("http", "https"): return f"has a scheme that a browser does not open ({parts.scheme!r})"
    if not parts.hostname or re.search(r"\s", address) or not re.fullmatch(r"[\w-]+(\.[\w-]+)+|localhost|127\.0\.0\.1", parts.hostname): return "is no address"


def find(site, page, path):
    "The file that a path, as written on a page, leads to."
    target = (site / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve()
    return target / "index.html" if target.is_dir() else target


def check(site):
    "Returns every fault of the site, as lines of text."
    site = Path(site).resolve()
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    faults = [] if pages else [f"{site} holds no page"]
    for path, page in pages.items():
        where = path.relative_to(site)
        faults += [f"{where}: the id {i!r} is there {page.ids.count(i)} times" for i in dict.fromkeys(page.ids) if page.ids.count(i) > 1 and not i.startswith("__")]
        for address, loaded in dict.fromkeys(page.links):
            if address.startswith("data:"): continue
            if re.match(r"[A-Za-z][\w+.-]*:|//", address):
                if fault := check_outside(address, loaded): faults.append(f"{where}: {address} {fault}")
                continue
            parts = urlsplit(address)
            target = find(site, path, unquote(parts.path)) if parts.path else path
            if not target.is_file(): faults.append(f"{where}: {address} leads nowhere")
            elif not target.is_relative_to(site): faults.append(f"{where}: {address} leaves the site")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids: faults.append(f"{where}: {address} names no place on {target.relative_to(site)}")
    for sheet in sorted(site.rglob("*.css")):
        for address in re.findall(r"(?:@import\s*|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)", sheet.read_text(encoding="utf-8")): faults.append(f"{sheet.relative_to(site)}: {address} is loaded from outside")
    return faults


if __name__ == "__main__":
    faults = check(sys.argv[1] if len(sys.argv) > 1 else "_site")
    if faults: sys.exit(f"{len(faults)} faults\n" + "\n".join(faults))
    print("every link leads somewhere, nothing is loaded from outside")
