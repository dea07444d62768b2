// The plain loop: every rank runs every block on its own rows; what crosses ranks is the attention chain's business.
#include "worker/models/dit.h"

static void run(const struct runner *self, const struct dit *m, struct exec *x, const struct dit_cond *cond,
                const struct dit_rows *rows, int step, struct tensor tokens, struct tensor out)
{
    (void)self, (void)step;
    struct dit_info info;
    m->ops->info(m, &info);
    const size_t mark = arena_mark(x->arena);
    struct dit_pass pass = {.cond = cond, .rows = rows};
    pass.hidden = exec_tensor(x, 2, rows->text.count + rows->image.count, info.hidden, 1, 1);
    m->ops->embed(m, x, &pass, tokens);
    for (int i = 0; i < info.blocks; i++)
        dit_block(m, x, &pass, i);
    m->ops->head(m, x, &pass, out);
    arena_release(x->arena, mark);
}

const struct runner runner_whole = {.run = run};
