// test_link.c: ranks whose devices are linked. The devices are the CPU's, the link under them a second region of shared
// memory; what stands on a link is the same as on GPUs: the communicator and its watcher, rows sent as they lie, and
// whole jobs by every method.
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/unit/ranks.h"

// ---- a link over shared memory

struct link {
    struct comm *inner, *with[MAX_RANKS]; // all ranks; this one and another
    atomic_uint_least64_t begun, done;
    _Atomic(const char *) what;
};

// Of this process; region and faults are set before ranks are forked.
static struct {
    int region;
    int unlike, doubled;    // the rank whose GPU is of another kind, or is rank 0's; 0: none
    atomic_bool has_failed; // what link_check says
} fake;

static int next_rank; // link_kind does not know it: set by each rank

static void fake_kind(struct device *d, char *kind, char *place)
{
    (void)d;
    snprintf(kind, LINK_KIND_BYTES, "%s", fake.unlike && next_rank == fake.unlike ? "abacus 2" : "abacus 1");
    snprintf(place, LINK_KIND_BYTES, "bead %d", fake.doubled && next_rank == fake.doubled ? 0 : next_rank);
}

static int fake_name(void *name, struct err *err)
{
    (void)err;
    memset(name, 'n', LINK_NAME_BYTES);
    return 0;
}

static int fake_link(struct device *d, const void *name, int rank, int ranks, int timeout_ms, struct link **out,
                     struct err *err)
{
    struct link *l = calloc(1, sizeof *l);
    (void)d, (void)timeout_ms;
    if (!l || ((const char *)name)[LINK_NAME_BYTES - 1] != 'n') {
        free(l);
        return err_set(err, ERR_INTERNAL, "another name");
    }
    *out = l;
    TRY(comm_shm_attach(fake.region, rank, &l->inner, err));
    for (int other = 0; other < ranks; other++) // pairs in one order on all ranks
        if (other != rank)
            TRY(comm_group(l->inner, other < rank ? other : rank, abs(other - rank), 2, &l->with[other], err));
    return 0;
}

static void fake_unlink(struct link *l)
{
    for (int r = 0; l && r < MAX_RANKS; r++)
        comm_free(l->with[r]);
    if (l)
        comm_free(l->inner);
    free(l);
}

static void move(char *flat, struct tensor t, bool in)
{
    const size_t row = (size_t)(tensor_count(t) / t.n[0]) * dtype_size(t.dtype);
    for (int64_t i = 0; i < t.n[0]; i++) {
        char *there = (char *)t.data + i * t.ld * (int64_t)dtype_size(t.dtype);
        memcpy(in ? there : flat + (size_t)i * row, in ? flat + (size_t)i * row : there, row);
    }
}

// Pieces side by side, by rank; flat NULL: their bytes alone.
static void lay_out(int ranks, int n, const struct link_piece *pieces, char *flat, bool in, int64_t *counts,
                    int64_t *offsets)
{
    int64_t at = 0;
    for (int r = 0; r < ranks; r++) {
        offsets[r] = at;
        for (int i = 0; i < n; i++) {
            if (pieces[i].rank != r || tensor_count(pieces[i].t) == 0)
                continue;
            if (flat != NULL)
                move(flat + at, pieces[i].t, in);
            at += (int64_t)tensor_bytes(pieces[i].t);
        }
        counts[r] = at - offsets[r];
    }
    offsets[ranks] = at;
}

// Messages are for two: other ranks do not hear of them.
static void exchange_with(struct link *l, int other, const char *from, int64_t out, char *to, int64_t in)
{
    const int me = comm_rank(l->inner), place = other > me; // the other's, of two
    int64_t outs[2] = {0}, ins[2] = {0};
    const int64_t at[2] = {0};
    outs[place] = out, ins[place] = in;
    if (out + in > 0)
        comm_all_to_all(l->with[other], from, outs, at, to, ins, at);
}

static void fake_exchange(struct device *d, struct link *l, const char *what, int sends, const struct link_piece *send,
                          int recvs, const struct link_piece *recv)
{
    int64_t out[COMM_MAX_RANKS], out_at[COMM_MAX_RANKS + 1], in[COMM_MAX_RANKS], in_at[COMM_MAX_RANKS + 1];
    const int ranks = comm_size(l->inner);
    (void)d;
    lay_out(ranks, sends, send, NULL, false, out, out_at);
    lay_out(ranks, recvs, recv, NULL, true, in, in_at);
    char *from = malloc((size_t)out_at[ranks] + 1), *to = calloc(1, (size_t)in_at[ranks] + 1);
    atomic_store(&l->what, what);
    atomic_fetch_add(&l->begun, 1);
    lay_out(ranks, sends, send, from, false, out, out_at);
    for (int r = 0; r < ranks; r++)
        if (r == comm_rank(l->inner))
            memcpy(to + in_at[r], from + out_at[r], (size_t)out[r]);
        else
            exchange_with(l, r, from + out_at[r], out[r], to + in_at[r], in[r]);
    lay_out(ranks, recvs, recv, to, true, in, in_at);
    if (comm_check(l->inner, NULL) == 0)
        atomic_fetch_add(&l->done, 1);
    else if (comm_check(l->inner, NULL) != ERR_UNAVAILABLE) // not an abort
        fake.has_failed = true;
    free(from);
    free(to);
}

static int fake_check(struct link *l, struct err *err)
{
    (void)l;
    return fake.has_failed ? err_set(err, ERR_UNAVAILABLE, "a bead is stuck") : 0;
}

static void fake_state(struct link *l, struct link_state *out)
{
    *out = (struct link_state){.done = atomic_load(&l->done), .begun = atomic_load(&l->begun), .seconds = 0.25};
    out->what = out->done < out->begun ? atomic_load(&l->what) : NULL;
}

static void fake_abort(struct link *l)
{
    comm_abort(l->inner, "given up");
}

static struct kernels linked(void)
{
    struct kernels k = kernels_cpu;
    k.link_kind = fake_kind;
    k.link_name = fake_name;
    k.link = fake_link;
    k.unlink = fake_unlink;
    k.exchange = fake_exchange;
    k.link_check = fake_check;
    k.link_state = fake_state;
    k.link_abort = fake_abort;
    return k;
}

static int linked_job(const struct group *g, struct comm *comm, struct err *err)
{
    next_rank = comm_rank(comm);
    return whole_job(g, comm, err);
}

static void run_linked(struct group *g)
{
    struct err err;
    fake.region = comm_shm_region(g->want.ranks, SLAB_BYTES, &err);
    assert_true(fake.region >= 0);
    run_group(g);
    close(fake.region);
}

// ---- jobs

static const char *const small[] = {"prompt",
                                    "a red ring on a blue background",
                                    "seed",
                                    "5",
                                    "width",
                                    "80",
                                    "height",
                                    "112",
                                    "num_inference_steps",
                                    "3",
                                    "max_sequence_length",
                                    "21",
                                    NULL};

static void job_by(const struct model *m, const char *const *fields, struct plan want, bool same_bits)
{
    struct kernels k = linked();
    Ditfleet__V1__Job *job = demo_job(m, fields);
    struct outcome *one = outcome_new(), *all = outcome_new();
    struct group g = {.model = m, .job = job, .want = PLAN(1, 1, 1, 1), .outcome = one, .work = whole_job};
    run_group(&g);
    expect_success(one, 1);
    if (same_bits) { // as the same plan over shared memory, with all weights on every rank
        g.want = want;
        memset(one, 0, sizeof *one);
        run_group(&g);
        expect_success(one, want.ranks);
    }
    g.want = want, g.outcome = all, g.work = linked_job, g.kernels = &k, g.apart = true;
    run_linked(&g);
    expect_success(all, want.ranks);
    if (same_bits) {
        assert_int_equal(all->used, one->used);
        for (int i = 0; i < one->entries; i++)
            if (memcmp(all->values + one->entry[i].at, one->values + one->entry[i].at,
                       (size_t)one->entry[i].count * sizeof *one->values) != 0)
                fail_msg("%s: %s has other bits", plan_text(&want), one->entry[i].name);
    } else {
        compare(all, one);
    }
    outcome_free(one);
    outcome_free(all);
    job_free(job);
}

static void every_method_goes_over_links(void **state)
{
    const struct model *m = *state;
    job_by(m, small, (struct plan)PLAN(2, 1, 2, 1), true);
    job_by(m, small, (struct plan)PLAN(3, 1, 1, 3), true);
    job_by(m, small, (struct plan)PLAN(4, 1, 2, 2), true);
    job_by(m, small, (struct plan)PLAN(2, 1, 2, 1), false);
    job_by(
        m, small,
        (struct plan){.ranks = 4, .cfg = 1, .ulysses = 2, .ring = 1, .pipe = 2, .patches = 2, .warmup = 1, .data = 1},
        true);
}

static void weights_go_over_links(void **state)
{
    struct plan heads = PLAN(2, 1, 2, 1), keys = PLAN(3, 1, 1, 3);
    heads.weights = keys.weights = PLAN_SHARDED;
    job_by(*state, small, heads, true);
    job_by(*state, small, keys, true);
}

static void guidance_goes_over_links(void **state)
{
    job_by(*state,
           FIELDS("prompt", "a red ring", "negative_prompt", "blue", "true_cfg_scale", "3", "seed", "5", "width", "64",
                  "height", "96", "num_inference_steps", "2"),
           (struct plan)PLAN(4, 2, 2, 1), false);
}

static void several_images_go_over_links(void **state)
{
    job_by(*state,
           FIELDS("prompt", "a red ring", "seed", "5", "width", "64", "height", "64", "num_inference_steps", "2",
                  "num_images", "2"),
           (struct plan){.ranks = 4, .cfg = 1, .ulysses = 2, .ring = 1, .pipe = 1, .patches = 1, .data = 2}, true);
}

static void refused(const struct model *m, enum err_code code, const char *text)
{
    struct kernels k = linked();
    Ditfleet__V1__Job *job = demo_job(m, small);
    struct outcome *o = outcome_new();
    struct group g = {
        .model = m, .job = job, .want = PLAN(3, 1, 1, 3), .outcome = o, .work = linked_job, .kernels = &k};
    run_linked(&g);
    for (int r = 0; r < 3; r++) { // on every rank alike
        assert_int_equal(o->rc[r], code);
        assert_non_null(strstr(o->err[r].text, text));
    }
    outcome_free(o);
    job_free(job);
}

static void gpus_that_differ_are_refused_before_the_first_word(void **state)
{
    fake.unlike = 2;
    refused(*state, ERR_INVALID, "rank 0 has abacus 1, rank 2 has abacus 2");
    fake.unlike = 0;
    fake.doubled = 1;
    refused(*state, ERR_INVALID, "rank 0 and rank 1 both have bead 0");
    fake.doubled = 0;
}

// ---- the watcher

enum fault { ONE_HANGS, ONE_STOPS_ALL, LINK_FAILS };

// Rank 0 waits for rank 1 on the link, which never comes.
static int with_fault(const struct group *g, struct comm *control, struct err *err)
{
    static const char *const said[] = {[ONE_HANGS] =
                                           "all_gather 0 of rank 0 of 2 did not end within 200 ms: another rank hangs",
                                       [ONE_STOPS_ALL] = "rank 1 had enough",
                                       [LINK_FAILS] = "a bead is stuck"};
    const enum fault fault = (enum fault)g->want.patches;
    const struct kernels k = linked();
    struct comm *c;
    next_rank = comm_rank(control);
    TRY(comm_link_new(control, &k, NULL, 1000, &c, err));
    comm_set_timeout(c, 200);
    if (next_rank == 0) {
        char mine = 1, all[2];
        comm_all_gather(c, &mine, all, (int64_t[]){1, 1});
        comm_check(c, err);
    } else {
        poll(NULL, 0, 60);
        if (fault == ONE_STOPS_ALL)
            comm_abort(control, "rank 1 had enough");
        fake.has_failed = fault == LINK_FAILS;
        while (comm_check(control, err) == 0)
            poll(NULL, 0, 5);
    }
    const bool fine = comm_check(control, err) == ERR_UNAVAILABLE && strstr(err->text, said[fault]);
    comm_free(c);
    return fine ? 0 : err_set(err, ERR_INTERNAL, "rank %d, fault %d: %.300s", next_rank, fault, err->text);
}

static void what_waits_for_others_is_ended(void **state)
{
    for (enum fault fault = ONE_HANGS; fault <= LINK_FAILS; fault++) {
        struct outcome *o = outcome_new();
        struct group g = {.model = *state, .want = PLAN(2, 1, 2, 1), .outcome = o, .work = with_fault};
        g.want.patches = (int)fault;
        run_linked(&g);
        expect_success(o, 2);
        outcome_free(o);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_method_goes_over_links),
        cmocka_unit_test(weights_go_over_links),
        cmocka_unit_test(guidance_goes_over_links),
        cmocka_unit_test(several_images_go_over_links),
        cmocka_unit_test(gpus_that_differ_are_refused_before_the_first_word),
        cmocka_unit_test(what_waits_for_others_is_ended),
    };
    return cmocka_run_group_tests(tests, ranks_set_up, ranks_tear_down);
}
