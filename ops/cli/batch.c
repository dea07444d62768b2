#include "ops/cli/batch.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_COLUMNS = 64 };

struct reader {
    const char *path;
    const Ditfleet__V1__Job *base;
    batch_check *check;
    struct batch *batch;
    char *at;      // what is left of the file, zero-terminated
    unsigned line; // of at, from 1
};

static int no_memory(struct err *err)
{
    return err_set(err, ERR_NO_MEMORY, "out of memory for the jobs of the file");
}

// The error so far, said of a line of the file.
static int at_line(const struct reader *r, unsigned line, struct err *err)
{
    return err_context(err, "%.200s line %u", r->path, line);
}

static int add_job(struct reader *r, Ditfleet__V1__Job **job, struct err *err)
{
    struct batch *b = r->batch;
    if ((b->n & (b->n - 1)) == 0) { // full at each power of two
        Ditfleet__V1__Job **more = realloc(b->jobs, (b->n ? 2 * b->n : 1) * sizeof(Ditfleet__V1__Job *));
        if (!more)
            return no_memory(err);
        b->jobs = more;
    }
    if (!(*job = job_copy(r->base)))
        return no_memory(err);
    b->jobs[b->n++] = *job;
    if (!*r->base->id)
        return 0;
    char id[JOB_NAME_SIZE + 24];
    snprintf(id, sizeof id, "%s-%zu", r->base->id, b->n);
    return job_set_field(*job, "id", id, err);
}

// ---- a prompt a line

static int read_prompt(struct reader *r, struct err *err)
{
    Ditfleet__V1__Job *job = NULL;
    char *text = r->at, *end = text + strcspn(text, "\n");
    r->at = end + (*end == '\n');
    if (end > text && end[-1] == '\r')
        end--;
    *end = 0;
    if (!*text)
        return 0;
    TRY(add_job(r, &job, err));
    TRY(job_set_field(job, "prompt", text, err));
    return r->check(job, err);
}

// ---- comma-separated values

// Unquotes one cell in place and moves r->at behind what ends it, which is *ended: ',', '\n' or 0.
static int take_cell(struct reader *r, char **cell, char *ended, struct err *err)
{
    char *from = r->at, *to = r->at;
    *cell = to;
    if (*from == '"') {
        for (from++; *from && (*from != '"' || from[1] == '"'); from++) {
            r->line += *from == '\n';
            from += *from == '"';
            *to++ = *from;
        }
        if (*from++ != '"')
            return err_set(err, ERR_INVALID, "a quoted cell does not end");
    } else {
        to += strcspn(from, ",\r\n");
        from = to;
    }
    from += *from == '\r' && from[1] == '\n';
    if (*from && *from != ',' && *from != '\n')
        return err_set(err, ERR_INVALID, "after a quoted cell there is neither a comma nor the end of the line");
    *ended = *from;
    r->at = from + (*from != 0);
    *to = 0;
    return 0;
}

// cells: (MAX_COLUMNS). An empty line has one empty cell.
static int take_record(struct reader *r, char **cells, int *n, struct err *err)
{
    char ended = ',';
    for (*n = 0; ended == ','; ++*n) {
        if (*n == MAX_COLUMNS)
            return err_set(err, ERR_INVALID, "more than %d cells", MAX_COLUMNS);
        TRY(take_cell(r, &cells[*n], &ended, err));
    }
    r->line += ended == '\n';
    return 0;
}

static int set_cells(struct reader *r, char *const *names, int n_names, char *const *cells, int n, struct err *err)
{
    Ditfleet__V1__Job *job = NULL;
    if (n == 1 && !*cells[0])
        return 0;
    if (n != n_names)
        return err_set(err, ERR_INVALID, "%d cells; the first line names %d", n, n_names);
    TRY(add_job(r, &job, err));
    for (int i = 0; i < n; i++)
        if (*cells[i])
            TRY(job_set_field(job, names[i], cells[i], err));
    return r->check(job, err);
}

static int read_csv(struct reader *r, struct err *err)
{
    char *names[MAX_COLUMNS], *cells[MAX_COLUMNS];
    int n_names, n;
    if (take_record(r, names, &n_names, err) != 0)
        return at_line(r, 1, err);
    while (*r->at) {
        const unsigned line = r->line;
        if (take_record(r, cells, &n, err) != 0 || set_cells(r, names, n_names, cells, n, err) != 0)
            return at_line(r, line, err);
    }
    return 0;
}

// ---- JSON lines

static int set_text(Ditfleet__V1__Job *job, const char *name, const json_t *value, struct err *err)
{
    char number[40];
    if (json_is_string(value))
        return job_set_field(job, name, json_string_value(value), err);
    if (json_is_integer(value))
        snprintf(number, sizeof number, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
    else if (json_is_real(value))
        snprintf(number, sizeof number, "%.17g", json_real_value(value));
    else
        return err_set(err, ERR_INVALID, "%.40s is neither text nor a number", name);
    return job_set_field(job, name, number, err);
}

// '=' or ':' of a field whose items are pairs, else 0.
static char separator_of(const char *name)
{
    size_t count;
    const struct job_rule *rules = job_rules(&count);
    for (size_t i = 0; i < count; i++)
        if (strcmp(rules[i].name, name) == 0)
            return rules[i].separator;
    return 0;
}

static int set_pairs(Ditfleet__V1__Job *job, const char *name, char separator, json_t *pairs, struct err *err)
{
    const char *key;
    json_t *value;
    json_object_foreach(pairs, key, value)
    {
        if (!json_is_string(value))
            return err_set(err, ERR_INVALID, "%.40s %.40s is no text", name, key);
        json_t *item = json_sprintf("%s%c%s", key, separator, json_string_value(value));
        int rc = item ? job_set_field(job, name, json_string_value(item), err) : no_memory(err);
        json_decref(item);
        TRY(rc);
    }
    return 0;
}

// The members of an object; prefix: "" or "output.".
static int set_members(Ditfleet__V1__Job *job, const char *prefix, json_t *object, struct err *err)
{
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value)
    {
        char name[80];
        snprintf(name, sizeof name, "%s%.60s", prefix, key);
        const char separator = json_is_object(value) ? separator_of(name) : 0;
        if (separator)
            TRY(set_pairs(job, name, separator, value, err));
        else if (json_is_object(value) && strcmp(name, "output") == 0)
            TRY(set_members(job, "output.", value, err));
        else if (!json_is_null(value))
            TRY(set_text(job, name, value, err));
    }
    return 0;
}

static int read_object(struct reader *r, struct err *err)
{
    Ditfleet__V1__Job *job = NULL;
    json_error_t why;
    char *text = r->at, *end = text + strcspn(text, "\n");
    r->at = end + (*end == '\n');
    if (text + strspn(text, " \t\r\n") >= end)
        return 0;
    json_t *object = json_loadb(text, (size_t)(end - text), JSON_REJECT_DUPLICATES, &why);
    int rc = 0;
    if (!object)
        rc = err_set(err, ERR_INVALID, "%.100s at column %d", why.text, why.column);
    else if (!json_is_object(object))
        rc = err_set(err, ERR_INVALID, "not a JSON object");
    rc = rc ? rc : add_job(r, &job, err);
    rc = rc ? rc : set_members(job, "", object, err);
    json_decref(object);
    return rc ? rc : r->check(job, err);
}

// ---- any of them

typedef int read_one(struct reader *r, struct err *err);

static int each_line(struct reader *r, read_one *one, struct err *err)
{
    for (; *r->at; r->line++)
        if (one(r, err) != 0)
            return at_line(r, r->line, err);
    return 0;
}

static int read_file(const char *path, char **text, struct err *err)
{
    FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "r");
    size_t size = 0;
    if (!f)
        return err_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%.300s: %s", path, strerror(errno));
    *text = NULL;
    errno = 0;
    ssize_t length = getdelim(text, &size, 0, f);
    const bool more = length >= 0 && ((*text)[length] != 0 || strlen(*text) != (size_t)length);
    const int error = ferror(f) ? errno : 0;
    if (f != stdin)
        fclose(f);
    if (error)
        return err_set(err, ERR_IO, "%.300s: %s", path, strerror(error));
    if (more)
        return err_set(err, ERR_INVALID, "%.300s is no text: it holds a zero byte", path);
    if (length < 0) {
        free(*text);
        *text = calloc(1, 1);
    }
    return *text ? 0 : no_memory(err);
}

// NULL after an error.
static const char *find_format(const char *path, const char *format, struct err *err)
{
    static const char *const formats[] = {"txt", "csv", "jsonl"};
    const char *dot = strrchr(path, '.');
    const char *name = format ? format : dot ? dot + 1 : "";
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (strcmp(name, formats[i]) == 0)
            return formats[i];
    err_set(err, ERR_INVALID, "%.200s: what it holds is not said; give --format txt, csv or jsonl",
            format ? format : path);
    return NULL;
}

int batch_read(const char *path, const char *format, const Ditfleet__V1__Job *base, batch_check *check,
               struct batch *out, struct err *err)
{
    char *text = NULL;
    struct reader r = {.path = path, .base = base, .check = check, .batch = out, .line = 1};
    *out = (struct batch){0};
    const char *kind = find_format(path, format, err);
    int rc = kind ? read_file(path, &text, err) : ERR_INVALID;
    if (rc == 0 && text) {
        r.at = text;
        r.at += strncmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0; // a byte order mark
        rc = *kind == 'c' ? read_csv(&r, err) : each_line(&r, *kind == 't' ? read_prompt : read_object, err);
    }
    if (rc == 0 && out->n == 0)
        rc = err_set(err, ERR_INVALID, "%.300s has no job", path);
    free(text);
    if (rc != 0)
        batch_free(out);
    return rc;
}

void batch_free(struct batch *batch)
{
    for (size_t i = 0; i < batch->n; i++)
        job_free(batch->jobs[i]);
    free(batch->jobs);
    *batch = (struct batch){0};
}
