/* noise_site.c - see noise_site.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_site.h"

const char *const noise_op_name[] = { "matmul", "bmm",  "softmax", "silu",
                                      "gelu",   "norm", "rope",    "head" };
const char *const noise_direction_name[] = { "forward", "backward" };
const char *const noise_module_name[] = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "input_layernorm", "post_attention_layernorm", "norm", "lm_head",
};
const char *const noise_point_name[] = { "input", "output", "weight" };
_Static_assert(COUNT_OF(noise_op_name) == NOISE_OP_COUNT, "a name for each operation");
_Static_assert(COUNT_OF(noise_direction_name) == NOISE_DIRECTION_COUNT, "and for both directions");
_Static_assert(COUNT_OF(noise_module_name) == NOISE_MODULE_COUNT, "a name for each module");
_Static_assert(COUNT_OF(noise_point_name) == NOISE_POINT_COUNT, "a name for each point");
_Static_assert((int)NOISE_MODULE_DOWN == (int)PROJ_DOWN, "projections come first, in enum order");

enum { LAST = NOISE_SITE_LAST, HEADS = NOISE_SITE_HEADS, ABOVE = NOISE_SITE_ABOVE,
       GRAD = NOISE_SITE_OF_GRAD };
const struct noise_site_about noise_site_about[NOISE_SITE_COUNT] = {
    [PROJ_Q] = { "q_proj", NOISE_OP_MATMUL, 0 },
    [PROJ_K] = { "k_proj", NOISE_OP_MATMUL, 0 },
    [PROJ_V] = { "v_proj", NOISE_OP_MATMUL, 0 },
    [PROJ_O] = { "o_proj", NOISE_OP_MATMUL, 0 },
    [PROJ_GATE] = { "gate_proj", NOISE_OP_MATMUL, 0 },
    [PROJ_UP] = { "up_proj", NOISE_OP_MATMUL, 0 },
    [PROJ_DOWN] = { "down_proj", NOISE_OP_MATMUL, 0 },
    [NOISE_SITE_SCORES] = { "scores", NOISE_OP_BMM, HEADS },
    [NOISE_SITE_VALUES] = { "values", NOISE_OP_BMM, 0 },
    [NOISE_SITE_PROBS] = { "probs", NOISE_OP_SOFTMAX, HEADS },
    [NOISE_SITE_SILU] = { "silu", NOISE_OP_SILU, 0 },
    [NOISE_SITE_NORM_IN] = { "input_layernorm", NOISE_OP_NORM, 0 },
    [NOISE_SITE_NORM_POST] = { "post_attention_layernorm", NOISE_OP_NORM, 0 },
    [NOISE_SITE_NORM_FINAL] = { "norm", NOISE_OP_NORM, LAST },
    [NOISE_SITE_ROPE_Q] = { "rope_q", NOISE_OP_ROPE, 0 },
    [NOISE_SITE_ROPE_K] = { "rope_k", NOISE_OP_ROPE, 0 },
    [NOISE_SITE_HEAD] = { "head", NOISE_OP_HEAD, LAST },
    [NOISE_SITE_DX_QKV] = { "dx_qkv", NOISE_OP_MATMUL, ABOVE },
    [NOISE_SITE_DX_O] = { "dx_o", NOISE_OP_MATMUL, 0 },
    [NOISE_SITE_DX_MLP] = { "dx_mlp", NOISE_OP_MATMUL, 0 },
    [NOISE_SITE_DX_DOWN] = { "dx_down", NOISE_OP_MATMUL, 0 },
    [NOISE_SITE_DQ] = { "dq", NOISE_OP_BMM, 0 },
    [NOISE_SITE_DK] = { "dk", NOISE_OP_BMM, 0 },
    [NOISE_SITE_DV] = { "dv", NOISE_OP_BMM, 0 },
    [NOISE_SITE_DPROBS] = { "dprobs", NOISE_OP_BMM, HEADS },
    [NOISE_SITE_DSCORES] = { "dscores", NOISE_OP_SOFTMAX, HEADS },
    [NOISE_SITE_DGATE] = { "dgate", NOISE_OP_SILU, 0 },
    [NOISE_SITE_DNORM_IN] = { "dnorm_in", NOISE_OP_NORM, ABOVE },
    [NOISE_SITE_DNORM_POST] = { "dnorm_post", NOISE_OP_NORM, 0 },
    [NOISE_SITE_DNORM_FINAL] = { "dnorm_final", NOISE_OP_NORM, LAST },
    [NOISE_SITE_ROPE_DQ] = { "rope_dq", NOISE_OP_ROPE, 0 },
    [NOISE_SITE_ROPE_DK] = { "rope_dk", NOISE_OP_ROPE, 0 },
    [NOISE_SITE_DHEAD] = { "dhead", NOISE_OP_HEAD, LAST },
    [NOISE_SITE_GRAD] = { "lora_grad", NOISE_OP_MATMUL, GRAD },
};
