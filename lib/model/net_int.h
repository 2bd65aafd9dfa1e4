/* net_int.h - the inside of a net, shared by the net_*.c files only.
 *
 * One block of the backend's memory holds everything; net_carve lays it out and, with no memory,
 * counts it. Names of shapes: R rows_max, D dim, F ffn_dim, Q heads * head_dim, K kv_heads *
 * head_dim, V vocab, H head rows. T is the type of activations: bf16, or f32 when the model is
 * MODEL_QUANT_F32.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NET_INT_H
#define QERL_NET_INT_H
#include <math.h>

#include "lib/model/net.h"
#include "lib/model/quant.h"

enum { NET_HEAD_ROWS = 64 };                      /* rows whose logits exist at once */

/* Projections that read the same input share one packed A, so u of a site is one product. */
enum net_site { NET_SITE_QKV, NET_SITE_O, NET_SITE_MLP, NET_SITE_DOWN, NET_SITE_COUNT };

/* What one layer's forward leaves for its backward. Without saving, layer 0's buffers serve every
 * layer. */
struct net_act {
    /* (R, D) f32: residual before each norm; only when training */
    kptr x_in, x_mid;
    kptr rstd_in, rstd_post;                      /* (R) f32; only when training */
    kptr h_in, h_post;                            /* (R, D) T: norm outputs */
    kptr q;                                       /* (R, Q) T, rotated */
    kptr attn;                                    /* (R, Q) T */
    kptr attn_clean;                              /* the same before noise; training with noise */
    kptr lse;                                     /* (R, heads) f32; only when training */
    kptr peaks;                                   /* (R, heads, 2) f32; with net_opts.noise_peaks */
    kptr gate, up;                                /* (R, F) T; only when training */
    kptr act;                                     /* (R, F) T: silu(gate) * up */
    kptr u[NET_SITE_COUNT];                       /* (R, site rank) T: bf16(s A x) */
};

struct net_lora_layer {
    /* [site rank, in]; .out 0 = nothing adapted here */
    struct kern_weight a[NET_SITE_COUNT];
    struct kern_weight b[PROJ_COUNT];             /* [out, rank] */
};

struct net_slot {
    bool open;
    int positions, pages;                         /* positions held; pages listed in the table */
};

/* What a call keeps of its rows and sequences in host memory; made once, not at each call. */
struct net_host {
    struct net_row *row;                          /* [R] */
    int32_t *upload;                              /* [3 R]: tokens, slots, positions */
    int32_t *want, *target;                       /* [R]: wanted rows; what each should predict */
    uint32_t *id;                                 /* [4 R]: prompt and sample; again, of wanted */
    int32_t *pos;                                 /* [2 R]: positions; again, of wanted rows */
    /* [slots_max + 1]: first row and first wanted row of each sequence */
    int32_t *seq_start, *want_start;
    int *seq, *slot;                              /* [slots_max]: index of the sequence; its slot */
    float *lp, *entropy, *coef;                   /* [H] */
    uint32_t *drawn;                              /* [3 R] as it comes back */
};

/* What is counted where on the backend: operations by direction, modules, the gradient. */
enum { NET_TALLY_MODULE = NOISE_OP_COUNT * NOISE_DIRECTION_COUNT,
       NET_TALLY_GRAD = NET_TALLY_MODULE + NOISE_MODULE_COUNT, NET_TALLIES };

/* Keys on the backend: of draws; of those of type systematic. */
enum { NET_NOISE_KEY, NET_NOISE_KEY_FIXED, NET_NOISE_KEYS };

/* Noise on weights of modules (net_noise_weights.c); not part of the one block. */
struct net_weights {
    bool ready;                                   /* made for this plan and seed */
    bool norms_ready;                             /* ... and dw with the AQN in force */
    const struct noise_plan *plan;
    uint64_t seed;
    kptr mem, dw;                                 /* dw: f32 (2 layers + 1, D), AQN's included */
    kptr buffer, pos;                             /* a block of rows in the making */
    size_t mem_bytes;
    struct kern_weight (*linear)[PROJ_COUNT], head;              /* .out 0 = not hit */
    struct noise_tally tally[NOISE_MODULE_COUNT]; /* of the draw */
    uint64_t draw;                                /* its number, from 1 */
};

/* Noise on operations and modules (net_noise.c); memory only with net_opts.noise. */
struct net_noise {
    bool on;                                      /* anything acts in this phase; false = clean */
    const struct noise_plan *plan;
    uint64_t seed, fixed_seed;
    kptr keys;                                    /* uint32 (NET_NOISE_KEYS, 2), read at a draw */
    bool ops[NOISE_DIRECTION_COUNT], modules;     /* what acts in this phase */
    kptr id, want_id, want_pos;                   /* (R, 2), (R, 2), (R): rows; wanted rows */
    kptr sums;                                    /* int64 (NET_TALLIES, KERN_NOISE_SUMS) */
    kptr wide;                                    /* (R, max(D, F)) f32: a result before noise */
    kptr norm_in;                                 /* (R, D) f32: a norm's own copy of its input */
    kptr in;                                      /* (R, max(D, F, Q)) T: a linear's own copy */
    kptr u;                                       /* (R, widest site rank) T: u from that copy */
    struct noise_evidence seen;                   /* passes and sites since the last take */
    /* The head runs in chunks, one site in all; more: its next chunk. again: what runs now was
     * measured before. */
    bool head_seen, more, again;
    bool all;                                     /* every row is wanted: id and pos serve both */
    struct net_weights weights;
    uint64_t weights_draws;                       /* made so far */
    uint64_t prompt;                              /* of the last sequence, and how often in a row */
    int64_t repeats;
};

/* Decode steps that the table keeps (net_step.c). */
struct net_graphs {
    uint8_t *state;                               /* [R + 1][2]: rows, cuts; NULL = none is kept */
    uint64_t bound;                               /* what they were recorded with */
    bool kept, counted;                           /* any is; counts is known */
    struct noise_evidence counts;                 /* the host's, of one step's operations */
};

struct net {
    const struct model *model;
    struct kern *k;
    struct net_opts o;
    enum kern_type type;                          /* T */
    bool round;                                   /* backward operands rounded to bf16 */
    int q_dim, kv_dim, head_rows, pages_max, slot_pages;

    kptr mem;                                     /* the one block */
    size_t mem_bytes;
    kptr cos, sin;                                /* (positions, head_dim / 2) f32 */
    kptr tokens, slots, pos, index, targets;      /* (R) int32 */
    kptr x;                                       /* (R, D) f32: the residual stream */
    /* (R, Q), (R, K), (R, K) f32: projections before rounding */
    kptr qf, kf, vf;
    /* (R, K) T: rotated keys on their way into the pages */
    kptr kt;
    kptr gate, up;                                /* (R, F) f32; in the backward their gradients */
    /* (R, D) f32, (R, D) T, (R): wanted rows, before and after the final norm */
    kptr hid, hid_t, hid_rstd;
    /* (R, widest input) T: a projection's input in model.activations; only where that rounds */
    kptr xq;
    kptr logits, lp, lse, entropy, coef;          /* (H, V), (H) f32 */
    kptr sampler;                                 /* (R) struct kern_sampler */
    kptr drawn;                                   /* (3, R): token int32, lp and lp_raw f32 */
    struct net_act *act;                          /* [layers] when training, else [1] */
    struct kern_kv kv;

    kptr dx, dh, dact, dk, dv, dq, du, dhid; /* backward scratch; only when training */
    kptr grad;                                    /* [params] f32, as lora.value */

    /* shape of the adapter (value NULL); rank 0 = none */
    struct lora lora;
    struct net_lora_layer *lora_layer;
    int site_rank[NET_SITE_COUNT];
    bool adapted;                                 /* an adapter is in use */
    bool plain;                                   /* model.activations and .adapter are left out */
    struct quant_stats adapter_stats[2];          /* what rounding did to A, to B */
    const struct noise_view *noise;
    struct net_noise op_noise;
    struct net_graphs graphs;

    struct net_slot *slot;                        /* host: [slots_max] */
    int32_t *table;                               /* host copy of kv.table */
    int *page_users, *page_free, pages_free;      /* sharers of each page; stack of free pages */
    struct net_host host;
    int wants;                                    /* rows ready in hid_t */
    bool apart;                                   /* rows of a decode step: kern_linear */
};

enum { NET_NO_LAYER = -1 };                       /* of the final norm and the head */

static inline enum net_site net_site_of(enum proj p) {
    return p <= PROJ_V    ? NET_SITE_QKV
           : p == PROJ_O  ? NET_SITE_O
           : p <= PROJ_UP ? NET_SITE_MLP
                          : NET_SITE_DOWN;
}
static inline size_t net_type_bytes(enum kern_type t) { return t == KERN_BF16 ? 2 : 4; }
/* First column of projection p in its site's u. */
int net_site_column(const struct net *n, enum proj p);
static inline kptr net_u_of(const struct net *n, const struct net_act *a, enum proj p) {
    return kptr_at(a->u[net_site_of(p)], (size_t)net_site_column(n, p) * net_type_bytes(n->type));
}
static inline bool net_lora_on(const struct net *n, enum proj p) {
    return n->adapted && n->lora.shape.on[p];
}
static inline float net_lora_scale(const struct net *n) {
    return n->lora.shape.alpha / (float)n->lora.shape.rank;
}

static inline float net_attn_scale(const struct net *n) {
    return 1.f / sqrtf((float)n->model->conf.head_dim);
}

/* net_adapter.c. Whether the adapters of projections p .. p + count - 1 read their input as the
 * weights do, in model.activations. */
bool net_adapter_rounds_in(const struct net *n, int layer, enum proj p, int count);
static inline bool net_rounds_in(const struct net *n, int layer, enum proj p) {
    return !n->plain && n->model->layer[layer].quant_in[p];
}
/* x rounded row by row to model.activations, into y; y may be x. */
void net_round_rows(struct net *n, kptr x, kptr y, int rows, int dim);
int net_widest_input(const struct net *n, const struct model_conf *m);
/* net_forward.c: layers over `rows` rows already uploaded (net_upload_rows); x ends as the last
 * residual. */
void net_upload_rows(struct net *n, const struct net_row *rows, int count);
void net_layers(struct net *n, int rows, bool save);
/* Final norm of the residual rows index[0 .. wants-1] (host) into hid_t; rstd kept when save. */
void net_want(struct net *n, const int32_t *index, int wants, bool save);
/* Logits of hid_t rows first .. first+count-1 (count <= head_rows) into n->logits. */
void net_head(struct net *n, int first, int count);
/* The same of rows 0 .. rows-1, which are all wanted; n->wants is set. */
void net_want_all(struct net *n, int rows);
/* Samplers of `count` rows, uploaded; whether any cuts. Then head and draws of all wanted rows. */
bool net_upload_samplers(struct net *n, const struct kern_sampler *s, int count);
void net_head_and_draw(struct net *n, bool cuts);
/* Brings `count` draws back, all at once. */
void net_fetch_drawn(struct net *n, int count, int32_t *token, float *lp, float *lp_raw);
/* net_step.c */
void net_graphs_init(struct net *n);
void net_graphs_release(struct net *n);
size_t net_graphs_states(const struct net *n);    /* bytes of .state */
/* Checks rows against the slots and makes room for them; the slots' lengths move. */
int net_claim(struct net *n, const struct net_row *rows, int count, struct err *e);
/* net_noise.c. Each takes an operation about to run; false: nothing is to be added here, run it.
 * true: it was run, with noise. */
bool net_noise_norm(struct net *n, int index, const struct kern_rmsnorm *a);
bool net_noise_rope(struct net *n, int layer, enum noise_site site, const struct kern_rope *a);
bool net_noise_attn(struct net *n, int layer, const struct net_act *act, struct kern_attn *a);
bool net_noise_swiglu(struct net *n, int layer, const struct kern_swiglu *a);
/* of wanted rows first .. */
bool net_noise_head(struct net *n, int first, const struct kern_linear *a);
/* Projections about to run leave out bias and residual where noise comes first; after them, end
 * adds all three. */
bool net_noise_linear(struct net *n, int layer, enum proj p, struct kern_linear *a, int count);
void net_noise_linear_end(struct net *n, int layer, enum proj p, const struct kern_linear *a,
                          int count, const kptr *y);
/* Whether a projection of this site has noise on its own input. Then the noise alone (absent where
 * it has none), for a product of its own, as x + e rounded as x is would lose what is small; and
 * for the backward that sum (x where there is no noise), and its columns of op_noise.u put where
 * they belong. */
bool net_noise_at_input(const struct net *n, int layer, enum proj p, int count);
kptr net_noise_input_delta(struct net *n, int layer, enum proj p, kptr x, int rows);
kptr net_noise_input(struct net *n, int layer, enum proj p, kptr x, int rows);
void net_noise_keep_u(struct net *n, enum proj p, const struct net_act *act, int rows);
/* Noise of an operation here, OFF where there is none; count: this is its application, not its
 * repetition in the backward. */
bool net_noise_op_here(const struct net *n, enum noise_op op, enum noise_direction d, int layer);
struct kern_noise net_noise_op(struct net *n, enum noise_op op, enum noise_direction d, int layer,
                               enum noise_site site, bool count);
/* Of a norm by its index: its layer, and what it reads: x or its own copy with noise. */
int net_noise_norm_layer(const struct net *n, int index);
kptr net_noise_norm_x(struct net *n, int index, kptr x, int rows, bool count);
/* Who the rows of a pass are; what follows what. */
void net_noise_rows(struct net *n, const struct net_row *rows, int count);
void net_noise_want(struct net *n, const int32_t *index, int wants);
void net_noise_want_all(struct net *n);
void net_noise_sequence(struct net *n, const struct net_seq *s);
/* Adds what the backend counted to op_noise.seen. */
int net_noise_take_sums(struct net *n, struct err *e);
/* Counts an application of noise on the weights of a module. */
void net_noise_weight_seen(struct net *n, enum noise_module m);
struct kern_noise net_noise_weight_draw(struct net *n, enum noise_module m, int layer);
enum noise_module net_noise_norm_module(const struct net *n, int index);
/* net_noise_weights.c: makes the noise of weights if the plan has any and the seed is new. */
int net_noise_prepare(struct net *n, struct err *e);
void net_noise_weights_release(struct net *n);
static inline bool net_noise_weights_on(const struct net *n) {
    return n->op_noise.modules && n->op_noise.weights.ready &&
           n->op_noise.plan->module_text.point == NOISE_POINT_WEIGHT;
}
/* Noise beside a module's weights, or NULL; beside a norm's: AQN's, the module's, or both. */
const struct kern_weight *net_noise_weight(const struct net *n, int layer, enum noise_module m);
kptr net_norm_dw(const struct net *n, int index);
kptr net_norm_dw_row(const struct net *n, int index);
/* net_noise_bwd.c: the same for the backward. */
bool net_noise_norm_bwd(struct net *n, int index, const struct kern_rmsnorm_bwd *a);
bool net_noise_attn_bwd(struct net *n, int layer, const struct net_act *act, int rows,
                        struct kern_attn_bwd *a);
void net_noise_swiglu_bwd(struct net *n, int layer, const struct kern_swiglu_bwd *a);
/* On a finished gradient [rows, dim] f32, in place. */
void net_noise_back(struct net *n, enum noise_op op, int layer, enum noise_site site, kptr dx,
                    int rows, int dim);
/* net_backward.c: from n->dx (gradient of the last residual) into n->grad, layers in reverse. */
void net_layers_bwd(struct net *n, int rows, const int32_t *seq_start, int seqs);
#endif
