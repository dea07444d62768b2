// Every step is O(n) in the text but the matching itself, which PCRE2's match limit bounds: prompts come from
// strangers.
#include "worker/deny_list.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <errno.h>
#include <pcre2.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <utf8proc.h>

enum {
    MAX_BYTES = 1 << 20, // of the file
    MAX_MARKS = 30,      // combining marks in a row that are kept, as Stream-Safe Text has it
    MOST_POINTS = 18,    // that one character becomes in NFKD
    MATCH_LIMIT = 2000000
};

struct rule {
    pcre2_code *code;
    int line;
};

struct deny_list {
    char *path;
    struct stat seen;
    struct rule *rules; // (n_rules)
    size_t n_rules;
    pcre2_match_context *limits;
};

// ---- text as it is compared

static bool is_space(utf8proc_int32_t c)
{
    const utf8proc_category_t k = utf8proc_category(c);
    return (c >= 9 && c <= 13) || c == 0x85 || k == UTF8PROC_CATEGORY_ZS || k == UTF8PROC_CATEGORY_ZL ||
           k == UTF8PROC_CATEGORY_ZP;
}

static int combining_class(utf8proc_int32_t c)
{
    return utf8proc_get_property(c)->combining_class;
}

// Puts one more code point of NFKD behind the n that are there: marks in their order, white space once.
static size_t put_point(utf8proc_int32_t *points, size_t n, utf8proc_int32_t c)
{
    const int class = combining_class(c);
    size_t at = n, marks = 0;
    if (is_space(c)) {
        if (n > 0 && points[n - 1] == ' ')
            return n;
        c = ' ';
    }
    while (class && marks < MAX_MARKS && marks < n && combining_class(points[n - 1 - marks]))
        marks++;
    if (marks == MAX_MARKS)
        return n;
    for (; class && at > 0 && combining_class(points[at - 1]) > class; at--)
        points[at] = points[at - 1];
    points[at] = c;
    return n + 1;
}

// malloc, length in *length; NULL: no memory. text is UTF-8.
static char *normalise(const char *text, size_t bytes, size_t *length)
{
    utf8proc_int32_t *points = malloc((bytes * MOST_POINTS + 1) * sizeof *points), one[MOST_POINTS], c;
    size_t n = 0;
    if (!points)
        return NULL;
    for (size_t i = 0; i < bytes;) {
        i += (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + i, (utf8proc_ssize_t)(bytes - i), &c);
        const utf8proc_ssize_t k = utf8proc_decompose_char(
            c, one, MOST_POINTS, UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT | UTF8PROC_IGNORE | UTF8PROC_STABLE, NULL);
        for (utf8proc_ssize_t j = 0; j < k && j < MOST_POINTS; j++)
            n = put_point(points, n, one[j]);
    }
    n = (size_t)utf8proc_normalize_utf32(points, (utf8proc_ssize_t)n, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    char *out = malloc(n * 4 + 1);
    utf8proc_uint8_t *end = (utf8proc_uint8_t *)out;
    for (size_t i = 0; out && i < n; i++)
        end += utf8proc_encode_char(points[i], end);
    free(points);
    if (!out)
        return NULL;
    *end = 0;
    *length = (size_t)(end - (utf8proc_uint8_t *)out);
    return out;
}

// ---- the file

static int add_rule(struct deny_list *d, pcre2_code *code, int line, struct err *err)
{
    struct rule *rules = realloc(d->rules, (d->n_rules + 1) * sizeof *rules);
    if (!rules) {
        pcre2_code_free(code);
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", d->path);
    }
    d->rules = rules;
    rules[d->n_rules++] = (struct rule){code, line};
    return 0;
}

static int compile(struct deny_list *d, const char *text, size_t n, uint32_t options, int line, struct err *err)
{
    int error;
    size_t offset;
    pcre2_code *code = pcre2_compile((PCRE2_SPTR)text, n, options | PCRE2_UTF | PCRE2_CASELESS, &error, &offset, NULL);
    if (!code) {
        PCRE2_UCHAR why[120] = "";
        pcre2_get_error_message(error, why, sizeof why);
        return err_set(err, ERR_INVALID, "%s:%d: no PCRE2 pattern: %s at its byte %zu", d->path, line, (char *)why,
                       offset);
    }
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    const int empty = match ? pcre2_match(code, (PCRE2_SPTR) "", 0, 0, 0, match, d->limits) : PCRE2_ERROR_NOMEMORY;
    pcre2_match_data_free(match);
    if (empty >= 0) {
        pcre2_code_free(code);
        return err_set(err, ERR_INVALID, "%s:%d: meets an empty prompt, so it would refuse every job", d->path, line);
    }
    return add_rule(d, code, line, err);
}

static int take_line(struct deny_list *d, const char *text, size_t n, int line, struct err *err)
{
    while (n > 0 && (*text == ' ' || *text == '\t'))
        text++, n--;
    while (n > 0 && (text[n - 1] == ' ' || text[n - 1] == '\t' || text[n - 1] == '\r'))
        n--;
    if (n == 0 || *text == '#')
        return 0;
    utf8proc_int32_t c;
    for (size_t i = 0; i < n;) {
        const utf8proc_ssize_t k = utf8proc_iterate((const utf8proc_uint8_t *)text + i, (utf8proc_ssize_t)(n - i), &c);
        if (k <= 0)
            return err_set(err, ERR_INVALID, "%s:%d: not UTF-8 at byte %zu", d->path, line, i);
        i += (size_t)k;
    }
    if (n > 2 && *text == '/' && text[n - 1] == '/')
        return compile(d, text + 1, n - 2, PCRE2_UCP, line, err);
    size_t length;
    char *phrase = normalise(text, n, &length);
    int rc = phrase ? compile(d, phrase, length, PCRE2_LITERAL, line, err)
                    : err_set(err, ERR_NO_MEMORY, "%s: out of memory", d->path);
    free(phrase);
    return rc;
}

static int take_lines(struct deny_list *d, const char *text, size_t n, struct err *err)
{
    if (memchr(text, 0, n))
        return err_set(err, ERR_INVALID, "%s: holds a zero byte; one phrase or /pattern/ a line is wanted", d->path);
    if (n >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0)
        text += 3, n -= 3;
    for (int line = 1; n > 0; line++) {
        const char *newline = memchr(text, '\n', n);
        const size_t length = newline ? (size_t)(newline - text) : n;
        TRY(take_line(d, text, length, line, err));
        text += length + (newline != NULL);
        n -= length + (newline != NULL);
    }
    return 0;
}

static int read_file(struct deny_list *d, struct err *err)
{
    FILE *f = fopen(d->path, "re");
    if (!f)
        return err_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: cannot open the deny list: %s", d->path,
                       strerror(errno));
    char *text = malloc(MAX_BYTES + 1);
    size_t n = text ? fread(text, 1, MAX_BYTES + 1, f) : 0;
    int rc = 0;
    if (!text)
        rc = err_set(err, ERR_NO_MEMORY, "%s: out of memory", d->path);
    else if (ferror(f) || fstat(fileno(f), &d->seen) != 0)
        rc = err_set(err, ERR_IO, "%s: cannot read the deny list: %s", d->path, strerror(errno));
    else if (n > MAX_BYTES)
        rc = err_set(err, ERR_INVALID, "%s: more than %d bytes", d->path, MAX_BYTES);
    else
        rc = take_lines(d, text, n, err);
    fclose(f);
    free(text);
    return rc;
}

int deny_list_load(const char *path, struct deny_list **out, struct err *err)
{
    struct deny_list *d = calloc(1, sizeof *d);
    *out = NULL;
    if (!d || !(d->path = strdup(path)) || !(d->limits = pcre2_match_context_create(NULL))) {
        deny_list_free(d);
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", path);
    }
    pcre2_set_match_limit(d->limits, MATCH_LIMIT);
    int rc = read_file(d, err);
    if (rc != 0)
        deny_list_free(d);
    else
        *out = d;
    return rc;
}

void deny_list_free(struct deny_list *d)
{
    if (!d)
        return;
    for (size_t i = 0; i < d->n_rules; i++)
        pcre2_code_free(d->rules[i].code);
    pcre2_match_context_free(d->limits);
    free(d->rules);
    free(d->path);
    free(d);
}

bool deny_list_changed(struct deny_list *d)
{
    const struct stat seen = d->seen;
    struct stat now;
    if (stat(d->path, &now) != 0)
        return false;
    d->seen = now;
    return now.st_ino != seen.st_ino || now.st_dev != seen.st_dev || now.st_size != seen.st_size ||
           now.st_mtim.tv_sec != seen.st_mtim.tv_sec || now.st_mtim.tv_nsec != seen.st_mtim.tv_nsec;
}

// ---- matching

int deny_list_match(const struct deny_list *d, const char *text, int *line, struct err *err)
{
    size_t length = 0;
    char *plain = normalise(text, strlen(text), &length);
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    int rc = plain && match ? 0 : err_set(err, ERR_NO_MEMORY, "no memory to look through the deny list");
    *line = 0;
    for (size_t i = 0; rc == 0 && *line == 0 && i < d->n_rules; i++) {
        const struct rule *r = &d->rules[i];
        const int found = pcre2_match(r->code, (PCRE2_SPTR)plain, length, 0, PCRE2_NO_UTF_CHECK, match, d->limits);
        if (found != PCRE2_ERROR_NOMATCH)
            *line = r->line;
        if (found < 0 && found != PCRE2_ERROR_NOMATCH)
            rc = err_set(err, ERR_UNSUPPORTED, "line %d of the deny list takes too long with this prompt", r->line);
    }
    pcre2_match_data_free(match);
    free(plain);
    return rc;
}
