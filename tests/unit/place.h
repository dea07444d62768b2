// place.h: for tests of what is kept on disk: a folder that is not there yet, below one that is the test's own.
#ifndef DITFLEET_TESTS_PLACE_H
#define DITFLEET_TESTS_PLACE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct place {
    char root[64], folder[128], file[512];
};

static inline int place_set_up(void **state)
{
    struct place *p = calloc(1, sizeof *p);
    strcpy(p->root, "/tmp/ditfleet-place-XXXXXX");
    assert_non_null(mkdtemp(p->root));
    snprintf(p->folder, sizeof p->folder, "%s/a/b", p->root);
    *state = p;
    return 0;
}

static inline int place_tear_down(void **state)
{
    char command[128];
    struct place *p = *state;
    snprintf(command, sizeof command, "rm -rf '%s'", p->root);
    assert_int_equal(system(command), 0);
    free(p);
    return 0;
}

#endif
