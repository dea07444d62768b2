// ditfleet dead: dead letters: DEAD jobs, refused submissions and callbacks that were given up.
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"

struct dead {
    struct connection connection; // its tenant: NULL for all
    const char *code;             // NULL: any
    bool json;
    struct queue_letter *letters; // (n)
    size_t n;
};

static const char *const kinds[] = {
    [QUEUE_LETTER_JOB] = "job", [QUEUE_LETTER_REFUSED] = "refused", [QUEUE_LETTER_CALLBACK] = "callback"};

static bool wanted(const struct dead *d, const struct queue_letter *l)
{
    return (!d->connection.tenant || strcmp(d->connection.tenant, l->tenant) == 0) &&
           (!d->code || strcmp(d->code, l->code) == 0);
}

// All letters that --tenant and --code ask for, the oldest first.
static int collect(struct dead *d, struct queue *q, struct err *err)
{
    char after[QUEUE_ENTRY_SIZE] = "";
    for (size_t got = 1; got > 0;) {
        struct queue_letter *page = realloc(d->letters, (d->n + QUEUE_BATCH) * sizeof *page);
        if (!page)
            return err_set(err, ERR_NO_MEMORY, "out of memory for dead letters");
        d->letters = page;
        page += d->n;
        TRY(queue_dead(q, after, page, &got, err));
        if (got > 0)
            memcpy(after, page[got - 1].letter, sizeof after);
        for (size_t i = 0; i < got; i++)
            if (wanted(d, &page[i]))
                d->letters[d->n++] = page[i];
    }
    return 0;
}

static json_t *letter_json(const struct queue_letter *l)
{
    json_t *object =
        json_pack("{s:s,s:I,s:s,s:s,s:s,s:s,s:s}", "letter", l->letter, "time_ms", (json_int_t)l->time_ms, "kind",
                  kinds[l->kind], "tenant", l->tenant, "id", l->id, "code", l->code, "error", l->error);
    if (*l->entry)
        json_object_set_new(object, "entry", json_string(l->entry));
    if (*l->callback)
        json_object_set_new(object, "callback", json_string(l->callback));
    return object;
}

static int list(struct dead *d, struct queue *q, struct err *err)
{
    TRY(collect(d, q, err));
    json_t *array = json_array();
    for (size_t i = 0; i < d->n; i++) {
        const struct queue_letter *l = &d->letters[i];
        json_array_append_new(array, letter_json(l));
        char when[32];
        const time_t seconds = (time_t)(l->time_ms / 1000);
        struct tm utc;
        strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&seconds, &utc));
        if (!d->json)
            printf("%s %s %-8s %s %s %s: %s\n", l->letter, when, kinds[l->kind], l->tenant, *l->id ? l->id : l->entry,
                   l->code, l->error);
    }
    if (d->json)
        json_print(array);
    else
        json_decref(array);
    return 0;
}

// Does it to one letter, and tells what came of it.
static int act(const struct dead *d, struct queue *q, bool retry, const char *letter, json_t *told, struct err *err)
{
    char entry[QUEUE_ENTRY_SIZE] = "";
    int rc = retry ? queue_dead_retry(q, letter, entry, err) : queue_dead_drop(q, letter, err);
    if (rc == 0 && !d->json)
        printf("%s %s%s%s\n", letter, retry ? "retried" : "dropped", *entry ? " as " : "", entry);
    json_t *object = json_pack("{s:s,s:b}", "letter", letter, "done", rc == 0);
    if (*entry)
        json_object_set_new(object, "entry", json_string(entry));
    if (rc != 0)
        json_object_set_new(object, "error", json_pack("{s:s,s:s}", "code", err_name(err->code), "message", err->text));
    json_array_append_new(told, object);
    return rc;
}

// "all": those of --tenant and --code; else the letters named. One that fails does not keep the others back; *err is
// the last failure, those before it are on stderr.
static int act_on(struct dead *d, struct queue *q, bool retry, const char *const *letters, int n, struct err *err)
{
    const bool all = n == 1 && strcmp(letters[0], "all") == 0;
    if (all)
        TRY(collect(d, q, err));
    json_t *told = json_array();
    int failed = 0;
    for (size_t i = 0; i < (all ? d->n : (size_t)n); i++) {
        struct err why = {.code = ERR_NONE};
        int rc = act(d, q, retry, all ? d->letters[i].letter : letters[i], told, &why);
        if (rc != 0 && failed)
            cli_fail(err);
        if (rc != 0) {
            *err = why;
            failed = rc;
        }
        if (rc == ERR_UNAVAILABLE || rc == ERR_TIMEOUT)
            break;
    }
    if (d->json)
        json_print(told);
    else
        json_decref(told);
    return failed;
}

static int dead(struct dead *d, const char *const *operands, int n)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    int rc = connection_open(&d->connection, &q, &err);
    if (rc == 0)
        rc = strcmp(operands[0], "list") == 0
                 ? list(d, q, &err)
                 : act_on(d, q, strcmp(operands[0], "retry") == 0, operands + 1, n - 1, &err);
    connection_close(&d->connection, q);
    free(d->letters);
    return rc ? cli_fail(&err) : CLI_OK;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct dead d = {0};
    const struct cli_flag flags[] = {
        CONNECTION_FLAGS(d.connection),
        {"--tenant", "NAME", "list, all: only letters of this tenant", CLI_STRING, &d.connection.tenant, 0, 0},
        {"--code", "CODE", "list, all: only letters with this error: internal, not_found, ...", CLI_STRING, &d.code, 0,
         0},
        {"--json", NULL, "print JSON", CLI_BOOL, &d.json, 0, 0},
    };
    const char **operands = calloc((size_t)argc, sizeof *operands);
    int n = 0;
    int code =
        operands ? cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, operands, &n) : CLI_FAILED;
    if (code < 0) {
        const bool lists = n > 0 && strcmp(operands[0], "list") == 0,
                   acts = n > 0 && (strcmp(operands[0], "retry") == 0 || strcmp(operands[0], "drop") == 0);
        code = cli_operands(self, lists || acts ? n : 0, lists ? 1 : n > 2 && acts ? n : 2);
    }
    code = code < 0 ? dead(&d, operands, n) : code;
    free(operands);
    return code;
}

const struct cli_command cli_dead = {"dead", "list | retry LETTER... | drop LETTER... (or all)",
                                     "dead letters: list them, try again, throw away", run, false};
