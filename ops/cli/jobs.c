// ditfleet jobs: the newest jobs that the queue knows of, by state, model, tenant and age.
#include <stdlib.h>
#include <string.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"

struct jobs {
    struct connection connection; // its tenant: NULL for all
    const char *states, *model, *newer, *older;
    int limit;
    bool json;
    uint64_t wanted;           // bit s: state s
    uint64_t from_ms, to_ms;   // created in between
    struct queue_listed *list; // (n) of those that match, at least the limit's newest
    size_t n, room, matched;
};

// ---- the filter

// "90s", "10m", "2h", "7d" -> milliseconds.
static int parse_age(const char *flag, const char *text, uint64_t *ms, struct err *err)
{
    static const char units[] = "smhd";
    static const double seconds[] = {1, 60, 3600, 86400};
    char *end;
    const double value = strtod(text, &end);
    const char *unit = *end ? strchr(units, *end) : NULL;
    if (end == text || !unit || end[1] || !(value >= 0) || value > 1e6)
        return err_set(err, ERR_INVALID, "%s is %.40s; allowed: a time like 90s, 10m, 2h, 7d", flag, text);
    *ms = (uint64_t)(1000 * value * seconds[unit - units]);
    return 0;
}

// "queued,running" -> bits; "active": all that are not final.
static int parse_states(const char *text, uint64_t *bits, struct err *err)
{
    *bits = 0;
    for (const char *word = text; *word; word += *word == ',') {
        char name[24];
        const int length = (int)strcspn(word, ",");
        snprintf(name, sizeof name, "%.*s", length, word);
        for (char *c = name; *c; c++)
            *c = *c >= 'a' && *c <= 'z' ? (char)(*c - 'a' + 'A') : *c;
        const Ditfleet__V1__State state = job_state_parse(name);
        const bool active = strcmp(name, "ACTIVE") == 0;
        if (state == DITFLEET__V1__STATE__STATE_UNKNOWN && !active)
            return err_set(err, ERR_INVALID,
                           "--state %.*s is no state; allowed: active, queued, delayed, leased, running, uploading, "
                           "retry_wait, succeeded, dead, cancelled, expired, and several with commas between",
                           length, word);
        for (int s = DITFLEET__V1__STATE__STATE_QUEUED; active && s <= DITFLEET__V1__STATE__STATE_EXPIRED; s++)
            if (!job_state_final((Ditfleet__V1__State)s))
                *bits |= UINT64_C(1) << s;
        if (!active)
            *bits |= UINT64_C(1) << state;
        word += length;
    }
    return 0;
}

static bool wanted(const struct jobs *j, const struct queue_listed *l)
{
    const size_t length = j->model ? strlen(j->model) : 0;
    const bool model =
        !j->model || (strncmp(l->pool, j->model, length) == 0 && (!l->pool[length] || l->pool[length] == '@'));
    return model && (!j->wanted || j->wanted & UINT64_C(1) << l->state) && l->created_ms >= j->from_ms &&
           l->created_ms <= j->to_ms;
}

// ---- the newest

static int newer_first(const void *a, const void *b)
{
    const struct queue_listed *x = a, *y = b;
    if (x->created_ms != y->created_ms)
        return x->created_ms < y->created_ms ? 1 : -1;
    // Of jobs that were admitted together the entries tell: stream ids, of which the longer is the later.
    const int longer = (int)strlen(y->entry) - (int)strlen(x->entry), later = strcmp(y->entry, x->entry);
    const int order = longer ? longer : later ? later : strcmp(x->tenant, y->tenant);
    return order ? order : (*x->id == '@') - (*y->id == '@');
}

static bool same_submission(const struct queue_listed *x, const struct queue_listed *y)
{
    return strcmp(x->entry, y->entry) == 0 && strcmp(x->tenant, y->tenant) == 0;
}

// Sorts, drops what was told twice, by Redis or under two names, and keeps no more than the limit.
static void keep_newest(struct jobs *j)
{
    size_t kept = 0;
    if (j->n == 0)
        return;
    qsort(j->list, j->n, sizeof *j->list, newer_first);
    for (size_t i = 0; i < j->n; i++)
        if (kept == 0 || !same_submission(&j->list[kept - 1], &j->list[i]))
            j->list[kept++] = j->list[i];
        else
            j->matched--;
    j->n = j->limit && kept > (size_t)j->limit ? (size_t)j->limit : kept;
}

static int take_page(struct jobs *j, const struct queue_listed *page, size_t count, struct err *err)
{
    if (j->n + count > j->room) {
        if (j->limit)
            keep_newest(j);
        const size_t room = 2 * (j->n + count);
        struct queue_listed *more = realloc(j->list, room * sizeof *more);
        if (!more)
            return err_set(err, ERR_NO_MEMORY, "out of memory for %zu jobs; say --limit", room);
        j->list = more;
        j->room = room;
    }
    for (size_t i = 0; i < count; i++)
        if (wanted(j, &page[i])) {
            j->list[j->n++] = page[i];
            j->matched++;
        }
    return 0;
}

static int collect(struct jobs *j, struct queue *q, struct err *err)
{
    char cursor[QUEUE_CURSOR_SIZE] = "0";
    do {
        struct queue_listed *page;
        size_t count;
        TRY(queue_list(q, j->connection.tenant, cursor, &page, &count, err));
        const int rc = take_page(j, page, count, err);
        free(page);
        TRY(rc);
    } while (strcmp(cursor, "0") != 0);
    keep_newest(j);
    return 0;
}

// ---- print

static const char *age(uint64_t ms, char out[16])
{
    const double s = (double)ms / 1000;
    if (s < 120)
        snprintf(out, 16, "%.0fs", s);
    else if (s < 7200)
        snprintf(out, 16, "%.0fm", s / 60);
    else if (s < 172800)
        snprintf(out, 16, "%.0fh", s / 3600);
    else
        snprintf(out, 16, "%.0fd", s / 86400);
    return out;
}

static void print_row(const struct queue_listed *l, uint64_t now_ms)
{
    char old[16], where[200] = "";
    const bool runs = !job_state_final(l->state) && *l->stage;
    if (runs && l->steps)
        snprintf(where, sizeof where, "%s %u/%u at %s", l->stage, l->step, l->steps, l->worker);
    else if (runs)
        snprintf(where, sizeof where, "%s at %s", l->stage, l->worker);
    else if (*l->error_code)
        snprintf(where, sizeof where, "%s", l->error_code);
    printf("%-24s %-10s %-20s %-12s %5s%s%s\n", l->id, job_state_name(l->state), l->pool, l->tenant,
           age(now_ms > l->created_ms ? now_ms - l->created_ms : 0, old), *where ? "  " : "", where);
}

static void print_table(const struct jobs *j, uint64_t now_ms)
{
    if (j->n)
        printf("%-24s %-10s %-20s %-12s %5s\n", "ID", "STATE", "MODEL", "TENANT", "AGE");
    for (size_t i = 0; i < j->n; i++)
        print_row(&j->list[i], now_ms);
    printf("%zu of %zu jobs\n", j->n, j->matched);
}

static void print_json(const struct jobs *j, uint64_t now_ms)
{
    json_t *array = json_array();
    for (size_t i = 0; i < j->n; i++) {
        const struct queue_listed *l = &j->list[i];
        json_array_append_new(array, json_pack("{s:s,s:s,s:s,s:s,s:s,s:s,s:i,s:i,s:I,s:I,s:s}", "id", l->id, "tenant",
                                               l->tenant, "state", job_state_name(l->state), "model", l->pool, "worker",
                                               l->worker, "stage", l->stage, "step", (int)l->step, "steps",
                                               (int)l->steps, "created_ms", (json_int_t)l->created_ms, "updated_ms",
                                               (json_int_t)l->updated_ms, "error_code", l->error_code));
    }
    json_print(
        json_pack("{s:I,s:I,s:o}", "now_ms", (json_int_t)now_ms, "matched", (json_int_t)j->matched, "jobs", array));
}

static int take_filter(struct jobs *j, uint64_t now_ms, struct err *err)
{
    uint64_t newer = now_ms, older = 0;
    if (j->states)
        TRY(parse_states(j->states, &j->wanted, err));
    if (j->newer)
        TRY(parse_age("--newer", j->newer, &newer, err));
    if (j->older)
        TRY(parse_age("--older", j->older, &older, err));
    j->from_ms = newer < now_ms ? now_ms - newer : 0;
    j->to_ms = j->older ? now_ms - (older < now_ms ? older : now_ms) : UINT64_MAX;
    return 0;
}

static int jobs(struct jobs *j)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    uint64_t now_ms = 0;
    int rc = take_filter(j, 0, &err); // what is wrong with it is said without Redis
    rc = rc ? rc : connection_open(&j->connection, &q, &err);
    rc = rc ? rc : queue_time(q, &now_ms, &err);
    rc = rc ? rc : take_filter(j, now_ms, &err);
    rc = rc ? rc : collect(j, q, &err);
    if (rc == 0)
        (j->json ? print_json : print_table)(j, now_ms);
    connection_close(&j->connection, q);
    free(j->list);
    return rc ? cli_fail(&err) : CLI_OK;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct jobs j = {.limit = 50};
    const struct cli_flag flags[] = {
        CONNECTION_FLAGS(j.connection),
        {"--tenant", "NAME", "whose jobs; default: everybody's", CLI_STRING, &j.connection.tenant, 0, 0},
        {"--state", "STATE,...", "only these: queued, running, dead, ..., or active, all that are not final",
         CLI_STRING, &j.states, 0, 0},
        {"--model", "NAME", "only of this model, NAME or NAME@VERSION", CLI_STRING, &j.model, 0, 0},
        {"--newer", "AGE", "only younger than 90s, 10m, 2h, 7d", CLI_STRING, &j.newer, 0, 0},
        {"--older", "AGE", "only older", CLI_STRING, &j.older, 0, 0},
        {"--limit", "N", "so many, the newest (default 50); 0: all", CLI_INT, &j.limit, 0, 1e9},
        {"--json", NULL, "print one JSON object", CLI_BOOL, &j.json, 0, 0},
    };
    int code = cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, NULL, NULL);
    return code < 0 ? jobs(&j) : code;
}

const struct cli_command cli_jobs = {"jobs", "", "the newest jobs, by state, model, tenant and age", run, false};
