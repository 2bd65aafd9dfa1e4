/* dapo.c - see dapo.h. In the order in which an update uses it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/dapo.h"

#include <math.h>

static double clamp(double x, double least, double most) {
    return x < least ? least : x > most ? most : x;
}

bool dapo_teaches(const double *metric, int n) {
    for (int i = 1; i < n; i++)
        if (metric[i] != metric[0]) return true;
    return n == 1;
}

void dapo_advantage(const double *reward, int n, int ddof, double eps, double *advantage) {
    double sum = 0, squares = 0;
    for (int i = 0; i < n; i++) sum += reward[i];
    double mean = sum / n;
    for (int i = 0; i < n; i++) squares += (reward[i] - mean) * (reward[i] - mean);
    double sd = n > ddof ? sqrt(squares / (n - ddof)) : 0;
    if (n == 1) {
        mean = 0;
        sd = 1;
    }
    bool teaches = dapo_teaches(reward, n);
    for (int i = 0; i < n; i++) advantage[i] = teaches ? (reward[i] - mean) / (sd + eps) : 0;
}

void dapo_advantage_mean(const double *reward, int n, double *advantage) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += reward[i];
    const double mean = n > 1 ? sum / n : 0;
    const bool teaches = dapo_teaches(reward, n);
    for (int i = 0; i < n; i++) advantage[i] = teaches ? reward[i] - mean : 0;
}

struct dapo_token dapo_loss(const struct dapo_clip *c, double a, double w, double lp_cur,
                            double lp_old) {
    double d = lp_cur - lp_old, ratio = exp(clamp(d, -20, 20));
    double plain = -a * ratio, cut = -a * clamp(ratio, 1 - c->low, 1 + c->high);
    /* d(-a r)/d lp = -a r */
    struct dapo_token t = { .loss = plain, .slope = fabs(d) > 20 ? 0 : plain };
    if (cut > plain) t = (struct dapo_token){ .loss = cut, .clipped = true };
    if (a < 0 && c->dual > 0 && t.loss > -a * c->dual)
        t = (struct dapo_token){ .loss = -a * c->dual,
                                 .clipped = t.clipped,
                                 .clipped_lower = true };
    t.loss *= w;
    t.slope *= w;
    return t;
}

struct dapo_token dapo_kl(double lp_ref, double lp_cur) {
    const double most = 10, d = clamp(lp_ref - lp_cur, -20, 20), k3 = expm1(d) - d;
    if (k3 > most) return (struct dapo_token){ .loss = most, .clipped = true };
    return (struct dapo_token){ .loss = k3, .slope = -expm1(d) };
}

double dapo_tis(double lp_old, double lp_mu, double cap) {
    double rho = exp(clamp(lp_old - lp_mu, -20, 20));
    return rho < cap ? rho : cap;
}

static void gap_tokens(struct dapo_gap *g, const float *old, const float *mu, int32_t n,
                       double cap) {
    double diff = 0, diff2 = 0, so = 0, sm = 0, soo = 0, smm = 0, som = 0;
    double rho_sum = 0, rho2 = 0, clamped_sum = 0, clamped2 = 0, high = 0, low = 0;
    g->is_min = INFINITY;
    for (int32_t i = 0; i < n; i++) {
        double d = (double)old[i] - (double)mu[i], po = exp((double)old[i]),
               pm = exp((double)mu[i]), p = fabs(po - pm);
        double rho = exp(clamp(d, -20, 20)), held = clamp(rho, 1 / cap, cap);
        diff += p;
        diff2 += p * p;
        so += po; sm += pm; soo += po * po; smm += pm * pm; som += po * pm;
        if (p > g->probs_diff_max) g->probs_diff_max = p;
        if (fabs(d) > g->logp_diff_max) g->logp_diff_max = fabs(d);
        g->logp_diff_mean += fabs(d);
        g->tokens_differ += memcmp(&old[i], &mu[i], sizeof *old) != 0;
        g->kl -= d;
        g->k2 += d * d / 2;
        g->k3_kl += rho - d - 1;
        rho_sum += rho;
        rho2 += rho * rho;
        clamped_sum += held;
        clamped2 += held * held;
        if (rho > g->is_max) g->is_max = rho;
        if (rho < g->is_min) g->is_min = rho;
        high += rho > cap;
        low += rho < 1 / cap;
    }
    double m = n, held_mean = clamped_sum / m, raw_spread = clamped2 / m - held_mean * held_mean;
    g->probs_diff_mean = diff / m;
    double spread = n > 1 ? (diff2 - diff * diff / m) / (m - 1) : 0;
    g->probs_diff_std = spread > 0 ? sqrt(spread) : 0;
    double vo = soo - so * so / m, vm = smm - sm * sm / m;
    g->probs_pearson = vo > 0 && vm > 0 ? (som - so * sm / m) / sqrt(vo * vm) : 1;
    g->logp_diff_mean /= m;
    g->kl /= m;
    g->k2 /= m;
    g->k3_kl /= m;
    g->chi2_token = rho2 / m - 1;
    g->is_mean = rho_sum / m;
    g->is_std = raw_spread > 0 ? sqrt(raw_spread) : 0;
    g->is_eff_sample_size = held_mean * held_mean / (clamped2 / m);
    g->is_fraction_high = high / m;
    g->is_fraction_low = low / m;
}

void dapo_gap(struct dapo_gap *g, const float *old, const float *mu, const int32_t *start, int seqs,
              double cap) {
    *g = (struct dapo_gap){ .tokens = start[seqs], .probs_pearson = 1, .is_eff_sample_size = 1 };
    if (!g->tokens) return;
    gap_tokens(g, old, mu, start[seqs], cap);
    int counted = 0;
    for (int s = 0; s < seqs; s++) {
        int32_t n = start[s + 1] - start[s];
        if (!n) continue;
        double lo = 0, lm = 0;
        for (int32_t i = start[s]; i < start[s + 1]; i++) {
            lo += (double)old[i];
            lm += (double)mu[i];
        }
        double diff = (lm - lo) / n;
        g->training_ppl += exp(-lo / n);
        g->rollout_ppl += exp(-lm / n);
        g->log_ppl_diff += diff;
        g->log_ppl_abs_diff += fabs(diff);
        g->ppl_ratio += exp(diff);
        g->chi2_seq += exp(2 * clamp(lo - lm, -20, 20)) - 1;
        counted++;
    }
    g->training_ppl /= counted;
    g->rollout_ppl /= counted;
    g->log_ppl_diff /= counted;
    g->log_ppl_abs_diff /= counted;
    g->ppl_ratio /= counted;
    g->chi2_seq /= counted;
}

double dapo_rate_at(const struct dapo_rate *r, int64_t s) {
    if (s < r->warmup) return r->peak * (double)s / (double)r->warmup;
    int64_t left = r->total - r->warmup;
    double after = (double)(s - r->warmup), span = (double)(left > 0 ? left : 1);
    switch (r->schedule) {
    case DAPO_SCHEDULE_CONSTANT: return r->peak;
    case DAPO_SCHEDULE_COSINE: break;
    case DAPO_SCHEDULE_WSD: {
        double stable = floor(r->stable * span);
        if (after < stable) return r->peak;
        after -= stable;
        span -= stable;
        if (span < 1) span = 1;
        break;
    }
    }
    double p = after / span < 1 ? after / span : 1;
    double share = (1 - r->floor) / 2 * cos(3.14159265358979323846 * p) + (1 + r->floor) / 2;
    return r->peak * (share > r->floor ? share : r->floor);
}

double dapo_grad_scale(double norm, double most) {
    double s = most / (norm + 1e-6);
    return s < 1 ? s : 1;
}
