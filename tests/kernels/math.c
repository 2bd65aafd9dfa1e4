/* math.c - the shared exp and log, and the packed formats.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

static double ulps(float got, double want) {
    float near = (float)want;
    double unit = (double)nextafterf(fabsf(near), INFINITY) - fabs((double)near);
    return fabs((double)got - want) / unit;
}

Test(math, exp_is_within_two_ulp) {
    double worst = 0.0;
    for (double x = -103.0; x < 88.7; x += 0.00037) {
        double u = ulps(kern_expf((float)x), exp((double)(float)x));
        if (u > worst) worst = u;
    }
    cr_assert(worst <= 2.0, "worst %.3f ulp", worst);
}

Test(math, exp_at_the_extremes) {
    cr_assert(kern_expf(-INFINITY) == 0.0f && kern_expf(-104.5f) == 0.0f &&
              kern_expf(-3e38f) == 0.0f);
    cr_assert(kern_expf(INFINITY) == INFINITY && kern_expf(88.8f) == INFINITY &&
              kern_expf(3e38f) == INFINITY);
    cr_assert(kern_expf(0.0f) == 1.0f && kern_expf(-0.0f) == 1.0f);
    cr_assert(isnan(kern_expf(NAN)) && isnan(kern_expf(-NAN)));
    cr_assert(kern_expf(-103.2f) == 0x1p-149f);
}

Test(math, log_is_within_two_ulp) {
    double worst = 0.0;
    for (double x = 1e-44; x < 3e38; x *= 1.00013) {
        double u = ulps(kern_logf((float)x), log((double)(float)x));
        if (u > worst) worst = u;
    }
    for (double x = 0.5; x < 2.0; x += 0.00001) {
        double u = ulps(kern_logf((float)x), log((double)(float)x));
        if (u > worst) worst = u;
    }
    cr_assert(worst <= 2.0, "worst %.3f ulp", worst);
    cr_assert(kern_logf(0.0f) == -INFINITY && kern_logf(INFINITY) == INFINITY &&
              kern_logf(1.0f) == 0.0f);
    cr_assert(isnan(kern_logf(-1.0f)) && isnan(kern_logf(NAN)));
}

Test(pack, scales) {
    cr_assert(pack_e8m0(127) == 1.0f && pack_e8m0(130) == 8.0f && pack_e8m0(0) == 0x1p-127f &&
              isnan(pack_e8m0(255)));
    cr_assert(pack_e4m3(0x38) == 1.0f && pack_e4m3(0x7e) == 448.0f && pack_e4m3(1) == 0x1p-9f &&
              pack_e4m3(0xb8) == -1.0f);
    for (int n = 0; n < 16; n++) cr_assert_eq(kern_bits(pack_e2m1_of((uint8_t)n)), kern_bits(pack_e2m1[n]));
    cr_assert(pack_e4m3(8) == 0x1p-6f && isnan(pack_e4m3(0x7f)));
    cr_assert(f32_to_bf16(1.00390625f) == 0x3f80 && f32_to_bf16(1.01171875f) == 0x3f82 &&
              f32_to_bf16(-0.0f) == 0x8000);
    cr_assert(f32_to_bf16(3.4e38f) == 0x7f80 && (f32_to_bf16(NAN) & 0x7f) != 0);
}

Test(pack, every_element_comes_back) {
    struct kt t;
    kt_open(&t);
    for (int d = 0; kt_dims[d]; d++)
        for (int e = 0; kt_dims[e] && kt_dims[e] < 70; e++) {
            int out = kt_dims[d], in = kt_dims[e];
            size_t n = (size_t)out * (size_t)in,
                   records = (size_t)((out + 15) / 16) * (size_t)((in + 31) / 32);
            cr_assert(kern_weight_bytes(KERN_FORMAT_MXFP4, out, in) == records * 272);
            cr_assert(kern_weight_bytes(KERN_FORMAT_NVFP4, out, in) == records * 288);
            float *x = kt_f32(&t, n, 1.0),
                  *a = kt_new(&t, kern_weight_bytes(KERN_FORMAT_F32, out, in));
            uint16_t *b = kt_new(&t, kern_weight_bytes(KERN_FORMAT_BF16, out, in)),
                     *h = kt_new(&t, n * 2);
            uint16_t *c = kt_new(&t, kern_weight_bytes(KERN_FORMAT_BF16, out, in));
            uint8_t *codes = kt_new(&t, n), *s32 = kt_new(&t, n), *q = kt_new(&t, records * 272),
                    *v = kt_new(&t, records * 288);
            for (size_t i = 0; i < n; i++) {
                codes[i] = (uint8_t)(kt_unit(&t) * 16);
                /* more than there are groups */
                s32[i] = (uint8_t)(60 + kt_unit(&t) * 50);
                h[i] = f32_to_bf16(x[i]);
            }
            pack_f32(a, KERN_FORMAT_F32, x, out, in);
            pack_f32(b, KERN_FORMAT_BF16, x, out, in);
            pack_bf16(c, h, out, in);
            cr_assert(!memcmp(b, c, kern_weight_bytes(KERN_FORMAT_BF16, out, in)));
            pack_codes(q, KERN_FORMAT_MXFP4, codes, s32, out, in);
            pack_codes(v, KERN_FORMAT_NVFP4, codes, s32, out, in);
            for (int o = 0; o < out; o++)
                for (int i = 0; i < in; i++) {
                    size_t at = (size_t)o * (size_t)in + (size_t)i;
                    float code = pack_e2m1[codes[at]];
                    cr_assert(pack_get(a, KERN_FORMAT_F32, out, in, o, i) == x[at]);
                    cr_assert(pack_get(b, KERN_FORMAT_BF16, out, in, o, i) == bf16_to_f32(h[at]));
                    cr_assert(pack_get(q, KERN_FORMAT_MXFP4, out, in, o, i) ==
                              code * pack_e8m0(s32[o * ((in + 31) / 32) + i / 32]));
                    cr_assert(pack_get(v, KERN_FORMAT_NVFP4, out, in, o, i) ==
                              code * pack_e4m3(s32[o * ((in + 15) / 16) + i / 16]));
                }
            kt_drop(&t);
        }
    kt_close(&t);
}

Test(select, names_what_the_machine_has) {
    struct kern k;
    struct err e = { 0 };
    cr_assert(kern_open(&k, "no-such-path", NULL, &e) == -1);
    cr_assert(e.code == EXIT_CONFIG && strstr(e.text, "ref"), "%s", e.text);
    cr_assert(kern_open(&k, NULL, NULL, &e) == 0);
    const char *names[8];
    cr_assert_str_eq(k.name, names[kern_paths(names) - 1]);
    kptr p;
    cr_assert(k.alloc(&k, &p, 1000, &e) == 0 && (uintptr_t)p.p % 64 == 0);
    for (int i = 0; i < 1000; i++) cr_assert(((uint8_t *)p.p)[i] == 0);
    k.free(&k, &p);
    cr_assert(!p.p && k.sync(&k, &e) == 0);
}
