// fuzz_conf.c: a configuration file. What is taken twice is the same.
#include "tests/fuzz/fuzz.h"

#include "proto/conf.h"

static void same_again(const struct conf *c, const char *text)
{
    struct conf *again;
    struct err err = {0};
    char id[CONF_WORKER_ID_BYTES];
    PROMISE(conf_parse(text, "fuzz.conf", &again, &err) == 0 && again->n_groups == c->n_groups);
    for (int i = 0; i < c->n_groups; i++) {
        const struct conf_group *g = &c->groups[i];
        char *one = conf_group_fingerprint(c, g), *two = conf_group_fingerprint(again, &again->groups[i]);
        PROMISE(one && two && strcmp(one, two) == 0);
        PROMISE(conf_group_find(c, g->name) == g && conf_group_threads(g) >= 1 && conf_worker_id(c, g->name, id)[0]);
        free(one);
        free(two);
    }
    conf_free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct conf *c;
    struct err err = {0};
    char *text = malloc(size + 1);
    PROMISE(text);
    if (size)
        memcpy(text, data, size);
    text[size] = '\0';
    if (fuzz_good(conf_parse(text, "fuzz.conf", &c, &err), &err)) {
        same_again(c, text);
        conf_free(c);
    }
    free(text);
    return 0;
}
