/* link.c - see link.h: which carrier a URL asks for, and waiting on several links at once.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/link.h"

#include <errno.h>
#include <time.h>
#include <zmq.h>

#include "lib/wire/carrier.h"

enum { LINKS_WAIT_MAX = 32 };

static const struct carrier *const carriers[] = { &carrier_zmq_ipc, &carrier_zmq_tcp, &carrier_tape,
                                                  &carrier_file };

static const struct carrier *carrier_of(const char *url, const char **rest) {
    *rest = url;
    if (strcmp(url, "-") == 0) return &carrier_pipe;
    for (size_t i = 0; i < COUNT_OF(carriers); i++)
        if (str_starts(url, carriers[i]->scheme)) {
            *rest = url + strlen(carriers[i]->scheme);
            return **rest ? carriers[i] : NULL;
        }
    return NULL;
}

int link_open(struct link **out, const char *url, const struct link_opts *o, struct err *e) {
    *out = NULL;
    const char *rest;
    const struct carrier *c = carrier_of(url, &rest);
    if (!c)
        return err_set(e,
                       "port '%s': cannot use '%s' as a link: it must be zmq+ipc://PATH, "
                       "zmq+tcp://HOST:PORT, tape:FILE, "
                       "file:FILE.jsonl or - (JSON lines on stdin or stdout)",
                       o->name, url);
    struct link *l = mem_alloc(sizeof *l);
    l->carrier = c;
    l->o = *o;
    l->o.name = l->name = mem_dup(o->name);
    l->o.identity = l->identity = o->identity ? mem_dup(o->identity) : NULL;
    l->url = mem_dup(url);
    l->fd = -1;
    if (c->open(l, rest, e) < 0) {
        err_wrap(e, "port '%s'", o->name);
        link_close(&l);
        return -1;
    }
    *out = l;
    return 0;
}

void link_close(struct link **lp) {
    struct link *l = *lp;
    if (!l) return;
    l->carrier->close(l);
    str_release(&l->out);
    str_release(&l->in);
    free(l->name);
    free(l->url);
    free(l->identity);
    free(l);
    *lp = NULL;
}

const char *link_name(const struct link *l) { return l->name; }
const char *link_url(const struct link *l) { return l->url; }
bool link_is_file(const struct link *l) { return l->carrier->file; }

int link_recv(struct link *l, struct rec *r, char *peer, int timeout_ms, struct err *e) {
    rec_init(r, REC_NONE);
    if (peer) peer[0] = 0;
    if (l->carrier->file && l->o.output)
        return err_set(e, "port '%s' (%s) is an output", l->name, l->url);
    if (l->ended) return LINK_END;
    int rc = l->carrier->recv(l, r, peer, timeout_ms, e);
    if (rc == LINK_END) l->ended = true;
    if (rc < 0 && e && !e->code) e->code = EXIT_FAILED;
    return rc;
}

int link_send(struct link *l, const struct rec *r, const char *peer, int timeout_ms,
              struct err *e) {
    if (l->carrier->file && !l->o.output)
        return err_set(e, "port '%s' (%s) is an input", l->name, l->url);
    if (rec_check(r, e) < 0) return err_wrap(e, "port '%s'", l->name);
    int rc = l->carrier->send(l, r, peer, timeout_ms, e);
    if (rc < 0) err_wrap(e, "port '%s'", l->name);
    return rc;
}

static bool readable(struct link *l) {
    return l && !l->ended && !(l->carrier->file && l->o.output);
}

int link_wait(struct link *const *l, int n, int timeout_ms) {
    zmq_pollitem_t item[LINKS_WAIT_MAX];
    int index[LINKS_WAIT_MAX], items = 0;
    assert(n <= LINKS_WAIT_MAX);
    for (int i = 0; i < n; i++) {
        if (!readable(l[i])) continue;
        if (l[i]->carrier->ready(l[i])) return i;
        index[items] = i;
        item[items++] = (zmq_pollitem_t){ l[i]->socket, l[i]->fd, ZMQ_POLLIN, 0 };
    }
    int rc = zmq_poll(item, items, timeout_ms);
    for (int i = 0; rc > 0 && i < items; i++)
        if (item[i].revents) return index[i];
    return -1;
}
