#!/bin/sh
# fetch.sh CASE - tools/fetch against a mirror made in a temporary folder: what is not whole never gets its name.
# Run by tests/pipes/fetch.c.
# SPDX-License-Identifier: Apache-2.0
set -u
here=$(cd "$(dirname "$0")/../.." && pwd)
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/tools" "$tmp/mirror" "$tmp/bin"
cp "$here/tools/fetch" "$tmp/tools/fetch"
fetch=$tmp/tools/fetch
seq 1 1000 > "$tmp/mirror/a.jsonl"
seq 1 500 > "$tmp/mirror/b.jsonl"
row() { # FILE SHA256 SOURCE
    printf 'set\t%s\t%s\t%s\t%s\tdata/set\ttested\t%s\n' "$1" "$(wc -c < "$tmp/mirror/$1" | tr -d ' ')" \
        "$(wc -l < "$tmp/mirror/$1" | tr -d ' ')" "$2" "$3"
}
{ for f in a b; do row $f.jsonl "$(sha256sum "$tmp/mirror/$f.jsonl" | cut -d ' ' -f 1)" "https://example.invalid/$f.jsonl"; done
} > "$tmp/tools/fetch.table"

die() { echo "fetch.sh: $*" >&2; cat "$tmp/log" >&2; exit 1; }
run() { # WANTED_STATUS ARGS...
    want=$1; shift
    "$fetch" "$@" > "$tmp/out" 2> "$tmp/log"
    got=$?
    [ $got = "$want" ] || die "'fetch $*' ended with $got, not $want"
}
nothing() { [ ! -e "$tmp/data/set" ] || die "data/set exists: $(ls "$tmp/data/set")"
            [ ! -e "$tmp/data/set.part" ] || die "data/set.part was left"; }
whole() { cmp "$tmp/mirror/a.jsonl" "$tmp/data/set/a.jsonl" && cmp "$tmp/mirror/b.jsonl" "$tmp/data/set/b.jsonl" &&
          [ "$(ls "$tmp/data")" = set ] && [ "$(ls "$tmp/data/set" | wc -l)" -eq 2 ] || die "data/set is not the mirror's"; }
said() { grep -q "$1" "$tmp/log" || die "nothing was said of '$1'"; }
fake_curl() { # BODY: what curl does after half of the file is written
    printf '#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && to=$2; shift; done\nhead -c 900 "%s/mirror/a.jsonl" > "$to"\n%s\n' \
        "$tmp" "$1" > "$tmp/bin/curl"
    chmod +x "$tmp/bin/curl"
    PATH=$tmp/bin:$PATH
}

case ${1:-} in
intact)
    run 0 set --from "$tmp/mirror"; whole
    run 0 set; said 'there already'
    run 0 --check set
    run 0 set --from "file://$tmp/mirror" --to "$tmp/elsewhere"
    cmp "$tmp/mirror/b.jsonl" "$tmp/elsewhere/b.jsonl" || die "--to" ;;
truncated)
    head -c 1000 "$tmp/mirror/a.jsonl" > "$tmp/x" && mv "$tmp/x" "$tmp/mirror/a.jsonl"
    run 1 set --from "$tmp/mirror"; nothing; said 'a.jsonl: has 1000 bytes' ;;
altered)
    sed 's/^777$/778/' "$tmp/mirror/a.jsonl" > "$tmp/x" && mv "$tmp/x" "$tmp/mirror/a.jsonl"
    run 1 set --from "$tmp/mirror"; nothing; said 'a.jsonl: sha256' ;;
lines)
    tr '\n' ' ' < "$tmp/mirror/b.jsonl" > "$tmp/x" && mv "$tmp/x" "$tmp/mirror/b.jsonl"
    run 1 set --from "$tmp/mirror"; nothing; said 'has 0 lines' ;;
empty)
    : > "$tmp/mirror/b.jsonl"
    run 1 set --from "$tmp/mirror"; nothing; said 'b.jsonl: is empty' ;;
missing)
    rm "$tmp/mirror/b.jsonl"
    run 1 set --from "$tmp/mirror"; nothing; said "no file 'b.jsonl'" ;;
interrupted)
    fake_curl 'kill -TERM $PPID'
    run 1 set; nothing; said stopped ;;
killed)
    fake_curl 'kill -KILL $PPID'
    run 137 set
    [ ! -e "$tmp/data/set" ] || die 'data/set exists after a kill'
    run 0 set --from "$tmp/mirror"; whole ;;
refused)
    fake_curl 'echo "curl: (6) Could not resolve host" >&2; exit 6'
    run 1 set; nothing; said 'is the network allowed' ;;
kept) # what is there and whole stays when a later fetch fails
    run 0 set --from "$tmp/mirror"
    echo more >> "$tmp/data/set/a.jsonl"
    cp "$tmp/data/set/b.jsonl" "$tmp/b"
    rm "$tmp/mirror/a.jsonl"
    run 1 set --from "$tmp/mirror"
    cmp "$tmp/b" "$tmp/data/set/b.jsonl" && [ ! -e "$tmp/data/set.part" ] || die 'an old file is gone'
    run 1 --check set; said 'a.jsonl: has' ;;
unverified)
    row a.jsonl - https://example.invalid/a.jsonl > "$tmp/tools/fetch.table"
    run 0 set --from "$tmp/mirror"; said UNVERIFIED ;;
usage)
    run 2; run 2 nosuch; run 2 set other; run 2 set --from; run 2 --nosuch
    run 0 --help; grep -q 'examples:' "$tmp/out" || die 'no examples'
    run 0 --list; grep -q '^set ' "$tmp/out" || die 'no list'
    run 0 --table; [ "$(wc -l < "$tmp/out")" -eq 2 ] || die 'no table'
    run 0 --hash set; (cd "$tmp/mirror" && sed 's,data/set/,,' "$tmp/out" | sha256sum -c --quiet) || die 'hashes'
    for tool in sh dirname cat cut head awk grep mkdir rm wc tr sha256sum; do ln -s "$(command -v $tool)" "$tmp/bin/$tool"; done
    PATH=$tmp/bin; run 4 set; PATH=/usr/bin:/bin; said "curl' is missing"; nothing ;;
*) echo "fetch.sh: unknown case '${1:-}'" >&2; exit 2 ;;
esac
