// test_sharing.c: ranks that share heads bring the rows of an attention's input together: any number of ranks, uneven
// and empty shares of rows, activations and numbers of 8 bits with their factors.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/ranks.h"
#include "worker/parallel/sharing.h"

enum { K_ = 12, HEADS = 12, PARTIES = 2 };

static const int64_t shares[][6] = {
    {4, 4, 4, 4, 4, 4}, {5, 3, 0, 1, 0, 7}, {0, 0, 9, 2, 2, 0}, {1, 0, 0, 0, 0, 1}, {0, 0, 0, 3, 3, 3}};

static int number(int64_t row, int64_t column, int round)
{
    return (int)((row * 7 + column * 3 + round * 11) % 100);
}

// Row `row` of all ranks' is the at-th of t.
static void fill(struct tensor t, int64_t at, int64_t row, int round)
{
    for (int64_t c = 0; c < t.n[1]; c++)
        if (t.dtype == DT_I8)
            ((int8_t *)t.data)[at * t.ld + c] = (int8_t)number(row, c, round);
        else
            ((float *)t.data)[at * t.ld + c] = (float)number(row, c, round);
    if (t.scale)
        t.scale[at] = (float)(row + round);
}

static bool has(struct tensor t, int64_t at, int64_t row, int round)
{
    bool fine = !t.scale || t.scale[at] == (float)(row + round);
    for (int64_t c = 0; c < t.n[1]; c++)
        fine = fine && number(row, c, round) == (t.dtype == DT_I8 ? ((int8_t *)t.data)[at * t.ld + c]
                                                                  : (int)((float *)t.data)[at * t.ld + c]);
    return fine;
}

static int share(struct exec *x, const struct input_sharing *s, const int64_t *rows, enum dtype type, int round,
                 struct err *err)
{
    const int me = comm_rank(x->comm), members = comm_size(s->comm);
    struct linear w = {.parts = 1, .n = 3 * HEADS, .k = K_};
    int64_t before = 0, of_party = 0;
    w.w[0] = tensor_2d(NULL, type, w.n, w.k);
    for (int r = 0; r < s->first + members; r++) {
        before += r < s->first ? rows[r] : 0;
        of_party += r < s->first ? 0 : rows[r];
    }
    const struct attention_input in = exec_attention_input(x, &w, HEADS, rows[me], rows);
    for (int64_t i = 0; i < rows[me]; i++)
        fill(in.mine, i, before + in.first_row + i, round);
    exec_share_input(x, &in);
    exec_input_shared(x);
    TRY(comm_check(x->comm, err));
    bool fine = in.heads == HEADS / members && in.first_head == in.heads * comm_rank(s->comm) &&
                in.rows.n[0] == of_party && in.mine.n[0] == rows[me];
    for (int64_t i = 0; i < of_party; i++)
        fine = fine && has(in.rows, i, before + i, round);
    return fine ? 0
                : err_set(err, ERR_INTERNAL, "rank %d of %d, %s, round %d: other rows", me, comm_size(x->comm),
                          dtype_name(type), round);
}

// Several rounds in one room: what a round brings takes the place of the one before.
static int rounds(struct exec *x, struct input_sharing *s, struct err *err)
{
    for (size_t i = 0; i < sizeof shares / sizeof *shares; i++) {
        const size_t mark = arena_mark(x->arena);
        int64_t total = 0;
        for (int r = 0; r < comm_size(s->comm); r++)
            total += shares[i][s->first + r];
        sharing_make_room(&s->room, x, s->comm, sharing_bytes(total, K_, DT_F32));
        for (int round = 0; round < 6; round++)
            TRY(share(x, s, shares[i], round % 2 ? DT_I8 : DT_F32, round, err));
        arena_release(x->arena, mark);
    }
    return 0;
}

static int in_parties(const struct group *g, struct comm *comm, struct err *err)
{
    const int members = g->want.ulysses, first = comm_rank(comm) / members * members;
    struct exec x = {.k = &kernels_cpu, .comm = comm, .attention = &attention_local};
    struct input_sharing sharing = {.first = first};
    TRY(kernels_cpu.open(&(struct device_options){.threads = 1}, &x.d, err));
    int rc = arena_new(&kernels_cpu, x.d, 1 << 20, &x.arena, err);
    if (rc == 0)
        rc = comm_group(comm, first, 1, members, &sharing.comm, err);
    x.sharing = &sharing;
    if (rc == 0)
        rc = rounds(&x, &sharing, err);
    comm_free(sharing.comm);
    arena_free(x.arena);
    kernels_cpu.close(x.d);
    return rc;
}

static void rows_come_together(void **state)
{
    (void)state;
    for (int members = 1; members <= 3; members++) {
        struct group g = {
            .want = {.ranks = PARTIES * members, .ulysses = members}, .outcome = outcome_new(), .work = in_parties};
        run_group(&g);
        expect_success(g.outcome, g.want.ranks);
        outcome_free(g.outcome);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_come_together),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
