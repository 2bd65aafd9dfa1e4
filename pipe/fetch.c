/* fetch.c - see fetch.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/fetch.h"

#include "lib/base/fs.h"

enum { NAME, FILE_NAME, BYTES, LINES, SHA256, DEST, STATUS, FIELDS };

static int64_t number(const char *text) {
    int64_t n;
    return str_to_i64(text, &n) ? n : -1;
}

bool fetch_find(struct fetch_row *r, const char *path) {
    struct str text;
    bool found = false;
    str_init(&text);
    if (fs_read(&text, "tools/fetch.table", 1 << 20, NULL) < 0) str_clear(&text);
    for (char *line = text.s, *next; line && *line && !found; line = next) {
        char *field[FIELDS + 1] = { line }, full[FS_PATH_MAX];
        int n = 1;
        next = strchr(line, '\n');
        if (next) *next++ = 0;
        for (char *p = line; *line != '#' && n <= FIELDS && (p = strchr(p, '\t')); n++) {
            *p++ = 0;
            field[n] = p;
        }
        if (n <= FIELDS) continue;
        snprintf(full, sizeof full, "%s/%s", field[DEST], field[FILE_NAME]);
        bool folder = strcmp(path, field[DEST]) == 0;
        if (!folder && strcmp(path, full) != 0) continue;
        *r = (struct fetch_row){ .bytes = folder ? -1 : number(field[BYTES]),
                                 .lines = folder ? -1 : number(field[LINES]) };
        snprintf(r->name, sizeof r->name, "%s", field[NAME]);
        snprintf(r->status, sizeof r->status, "%s", field[STATUS]);
        if (!folder) snprintf(r->sha256, sizeof r->sha256, "%s", field[SHA256]);
        found = true;
    }
    str_release(&text);
    return found;
}

void fetch_hint(struct str *out, const char *path, const char *role, const char *asked) {
    struct fetch_row r;
    if (!fetch_find(&r, path)) {
        if (str_starts(asked, "tools/fetch "))
            str_printf(out,
                       "tools/fetch has no '%s'; set %s%s to what you have (paths are relative to "
                       "the current folder)",
                       path, strcmp(role, "model") == 0 ? "model.path" : "data.",
                       strcmp(role, "model") == 0 ? "" : role);
        else str_puts(out, asked);
        return;
    }
    str_printf(out, "tools/fetch %s", r.name);
    if (r.lines >= 0)
        str_printf(out, " (%lld lines, %lld bytes, sha256 %.12s...)", (long long)r.lines,
                   (long long)r.bytes, r.sha256);
    else if (r.bytes >= 0)
        str_printf(out, " (%lld bytes, sha256 %.12s...)", (long long)r.bytes, r.sha256);
    else if (strcmp(r.status, "untested") == 0) str_puts(out, " (untested)");
}
