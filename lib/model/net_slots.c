/* net_slots.c - sequences as lists of KV pages: opened, forked with shared pages, grown, closed.
 *
 * Knows: which page holds which positions of which slot, and how many slots share it.
 * Does not know: what is in a page. A page that has sharers is full, so nobody ever writes into it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/net_int.h"

static int32_t *slot_row(const struct net *n, int slot) {
    return n->table + (size_t)slot * (size_t)n->slot_pages;
}

static void table_upload(struct net *n, int slot) {
    const size_t bytes = (size_t)n->slot_pages * sizeof(int32_t);
    n->k->upload(n->k, kptr_at(n->kv.table, (size_t)slot * bytes), slot_row(n, slot), bytes);
}

static int page_take(struct net *n) {
    if (!n->pages_free) return -1;
    int page = n->page_free[--n->pages_free];
    assert(n->page_users[page] == 0);
    n->page_users[page] = 1;
    return page;
}

int net_slot_open(struct net *n) {
    for (int s = 0; s < n->o.slots_max; s++) {
        if (n->slot[s].open) continue;
        if (!n->pages_free) return -1;
        n->slot[s] = (struct net_slot){ .open = true };
        return s;
    }
    return -1;
}

int net_slot_reserve(struct net *n, int slot, int positions) {
    struct net_slot *s = &n->slot[slot];
    assert(slot >= 0 && slot < n->o.slots_max && s->open);
    const int pages = (positions + KERN_PAGE - 1) / KERN_PAGE;
    if (pages <= s->pages) return 0;
    if (pages > n->slot_pages || pages - s->pages > n->pages_free) return -1;
    while (s->pages < pages) slot_row(n, slot)[s->pages++] = page_take(n);
    table_upload(n, slot);
    return 0;
}

int net_slot_fork(struct net *n, int from, int positions) {
    const struct net_slot *f = &n->slot[from];
    assert(f->open && positions >= 0 && positions <= f->positions);
    const int full = positions / KERN_PAGE, partial = positions % KERN_PAGE != 0;
    if (partial && !n->pages_free) return -1;
    int slot = -1;
    for (int s = 0; s < n->o.slots_max && slot < 0; s++)
        if (!n->slot[s].open) slot = s;
    if (slot < 0) return -1;
    n->slot[slot] = (struct net_slot){ .open = true,
                                       .positions = positions,
                                       .pages = full + partial };
    for (int i = 0; i < full; i++) {
        slot_row(n, slot)[i] = slot_row(n, from)[i];
        n->page_users[slot_row(n, from)[i]]++;
    }
    if (partial) {
        const size_t bytes = (size_t)n->kv.layers * 2 * (size_t)n->kv_dim * KERN_PAGE *
                             net_type_bytes(n->type);
        const int page = page_take(n), old = slot_row(n, from)[full];
        slot_row(n, slot)[full] = page;
        n->k->copy(n->k, kptr_at(n->kv.pages, (size_t)page * bytes),
                   kptr_at(n->kv.pages, (size_t)old * bytes), bytes);
    }
    table_upload(n, slot);
    return slot;
}

void net_slot_close(struct net *n, int slot) {
    struct net_slot *s = &n->slot[slot];
    assert(slot >= 0 && slot < n->o.slots_max && s->open);
    for (int i = s->pages - 1; i >= 0; i--) {
        const int page = slot_row(n, slot)[i];
        if (--n->page_users[page] == 0) n->page_free[n->pages_free++] = page;
    }
    *s = (struct net_slot){ 0 };
}

int net_claim(struct net *n, const struct net_row *rows, int count, struct err *e) {
    for (int i = 0; i < count; i++) {
        const struct net_row *r = &rows[i];
        if (r->token < 0 || r->token >= n->model->conf.vocab)
            return err_set(e, "token id %d is outside the vocabulary of %d", r->token,
                           n->model->conf.vocab);
        if (r->slot < 0 || r->slot >= n->o.slots_max || !n->slot[r->slot].open)
            return err_set(e, "row %d names slot %d, which is not open", i, r->slot);
        if (r->pos != n->slot[r->slot].positions)
            return err_set(e, "row %d has position %d, but its slot holds %d", i, r->pos,
                           n->slot[r->slot].positions);
        if (r->pos >= n->o.positions_max)
            return err_set(e, "position %d is past the longest sequence of %d", r->pos,
                           n->o.positions_max);
        if (net_slot_reserve(n, r->slot, r->pos + 1) < 0)
            return err_set(e, "no KV page is free for position %d", r->pos);
        n->slot[r->slot].positions++;
    }
    return 0;
}
