# SPDX-License-Identifier: Apache-2.0
"""The private apt root's configuration: of the host's, the mirrors and the way to the network, nothing else.

Must not run apt.
Specification: sources.list(5), apt.conf(5).
"""

from __future__ import annotations

from pathlib import Path

from vhostfs.vm.debian import (
    OFFICIAL,
    Mirrors,
    Release,
    Source,
    choose_mirrors,
    configuration_text,
    host_sources,
    parse_deb822_sources,
    parse_one_line_sources,
    parse_stanzas,
    sources_text,
)


def test_one_line_sources_are_read_with_and_without_options() -> None:
    text = """
# deb http://commented.example/debian bookworm main
deb http://one.example/debian bookworm main contrib
deb [arch=amd64 signed-by=/k.gpg] https://two.example/debian-security/ bookworm-security main
deb-src http://src.example/debian bookworm main
nonsense
"""
    assert parse_one_line_sources(text) == [
        Source("http://one.example/debian", "bookworm"),
        Source("https://two.example/debian-security/", "bookworm-security"),
    ]


def test_deb822_sources_are_read_for_every_uri_and_suite() -> None:
    text = """Types: deb deb-src
# a comment
URIs: http://a.example/debian
 http://b.example/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Enabled: no

Types: deb-src
URIs: http://src.example/debian
Suites: bookworm
"""
    assert parse_deb822_sources(text) == [
        Source("http://a.example/debian", "bookworm"),
        Source("http://a.example/debian", "bookworm-updates"),
        Source("http://b.example/debian", "bookworm"),
        Source("http://b.example/debian", "bookworm-updates"),
    ]


def test_the_hosts_mirrors_are_taken_and_vendors_are_not() -> None:
    sources = [
        Source("https://vendor.example/linux/debian-tools", "bookworm"),
        Source("https://vendor.example/ubuntu", "noble"),
        Source("http://mirror.example/pub/debian/", "bookworm"),
        Source("http://mirror.example/pub/debian-security", "bookworm-security"),
    ]
    assert choose_mirrors(sources) == Mirrors(
        "http://mirror.example/pub/debian", "http://mirror.example/pub/debian-security"
    )


def test_debians_own_archive_is_used_where_the_host_names_none() -> None:
    assert choose_mirrors([]) == OFFICIAL
    assert choose_mirrors([Source("cdrom:[Debian]/", "bookworm")]) == OFFICIAL


def test_the_hosts_sources_are_read_in_both_formats(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://a.example/debian bookworm main\n")
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "b.list").write_text("deb http://b.example/debian bookworm main\n")
    (parts / "c.sources").write_text("Types: deb\nURIs: http://c.example/debian\nSuites: bookworm\n")
    (parts / "d.list.disabled").write_text("deb http://d.example/debian bookworm main\n")
    assert [source.uri[7] for source in host_sources(tmp_path)] == ["a", "b", "c"]


def test_a_host_without_apt_has_no_sources(tmp_path: Path) -> None:
    assert host_sources(tmp_path / "nothing") == []


def test_every_source_is_bound_to_debians_keyring() -> None:
    text = sources_text(Release.TRIXIE, OFFICIAL, Path("/k.gpg"))
    stanzas = list(parse_stanzas(text))
    assert [stanza["Suites"] for stanza in stanzas] == [
        "trixie trixie-updates trixie-backports",
        "trixie-security",
    ]
    assert {stanza["Signed-By"] for stanza in stanzas} == {"/k.gpg"}
    assert {stanza["Types"] for stanza in stanzas} == {"deb"}
    source = sources_text(Release.TRIXIE, OFFICIAL, Path("/k.gpg"), "deb-src")
    assert source == text.replace("Types: deb\n", "Types: deb-src\n")


def test_of_the_hosts_configuration_only_the_network_options_are_kept() -> None:
    dump = """Acquire::http::Proxy "http://proxy.example:3128";
Acquire::https "";
Acquire::Retries "3";
Acquire::GzipIndexes "true";
DPkg::Post-Invoke:: "rm -f /var/cache/apt/archives/*.deb";
APT::Update::Post-Invoke:: "rm -f /var/cache/apt/*.bin";
Dir::Cache "/var/cache/apt";
"""
    text = configuration_text(Path("/root-of-ours"), dump, is_root=False)
    assert 'Acquire::http::Proxy "http://proxy.example:3128";' in text
    assert 'Acquire::Retries "3";' in text
    assert "Post-Invoke" not in text
    assert "/var/cache" not in text
    assert 'Dir "/root-of-ours/";' in text


def test_apts_download_user_is_root_only_for_root() -> None:
    assert 'APT::Sandbox::User "root";' in configuration_text(Path("/r"), "", is_root=True)
    assert 'APT::Sandbox::User "";' in configuration_text(Path("/r"), "", is_root=False)
