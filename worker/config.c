#include "worker/config.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

struct config {
    json_t *root;
    json_t *asked; // the keys that were read
    struct err *err;
    char path[1024];
};

static struct config *read_root(struct config *c)
{
    struct stat st;
    json_error_t why;
    if (stat(c->path, &st) != 0) {
        config_fail(c, ERR_NOT_FOUND, "cannot be read (%s)", strerror(errno));
    } else if (!S_ISREG(st.st_mode) || st.st_size > (64 << 20)) {
        config_fail(c, ERR_CORRUPT, "not a regular file of at most 64 MiB");
    } else {
        c->root = json_load_file(c->path, JSON_REJECT_DUPLICATES, &why);
        if (!json_is_object(c->root))
            config_fail(c, ERR_CORRUPT, "line %d: not a JSON object: %s", why.line, why.text);
    }
    return c;
}

struct config *config_open(const char *dir, const char *name, struct err *err)
{
    struct config *c = calloc(1, sizeof *c);
    err->code = ERR_NONE;
    if (!c) {
        err_set(err, ERR_NO_MEMORY, "%s/%s: out of memory", dir, name);
        return NULL;
    }
    c->err = err;
    c->asked = json_object();
    if (snprintf(c->path, sizeof c->path, "%s/%s", dir, name) >= (int)sizeof c->path)
        config_fail(c, ERR_INVALID, "path too long");
    else
        read_root(c);
    return c;
}

int config_close(struct config *c, struct err *err)
{
    if (c) {
        json_decref(c->root);
        json_decref(c->asked);
        free(c);
    }
    return err->code;
}

void config_fail(struct config *c, enum err_code code, const char *format, ...)
{
    if (!c || c->err->code != ERR_NONE)
        return;
    char text[sizeof c->err->text];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    err_set(c->err, code, "%.250s: %.250s", c->path, text);
}

// NULL when absent, null, or when something failed before.
static json_t *value(const struct config *c, const char *key)
{
    if (!c || c->err->code != ERR_NONE)
        return NULL;
    json_object_set_new(c->asked, key, json_true());
    json_t *v = json_object_get(c->root, key);
    return json_is_null(v) ? NULL : v;
}

static void require(struct config *c, const char *key)
{
    if (!value(c, key))
        config_fail(c, ERR_INVALID, "%s is missing", key);
}

void config_float_or(struct config *c, const char *key, double min, double max, double *out)
{
    json_t *v = value(c, key);
    double d = json_number_value(v);
    if (v && (!json_is_number(v) || !isfinite(d) || d < min || d > max))
        config_fail(c, ERR_INVALID, "%s must be a number from %g to %g", key, min, max);
    else if (v)
        *out = d;
}

static bool whole(const json_t *v, int64_t min, int64_t max)
{
    return json_is_integer(v) && json_integer_value(v) >= min && json_integer_value(v) <= max;
}

void config_int_or(struct config *c, const char *key, int64_t min, int64_t max, int64_t *out)
{
    json_t *v = value(c, key);
    if (v && !whole(v, min, max))
        config_fail(c, ERR_INVALID, "%s must be a whole number from %lld to %lld", key, (long long)min, (long long)max);
    else if (v)
        *out = json_integer_value(v);
}

void config_bool_or(struct config *c, const char *key, bool *out)
{
    json_t *v = value(c, key);
    if (v && !json_is_boolean(v))
        config_fail(c, ERR_INVALID, "%s must be true or false", key);
    else if (v)
        *out = json_is_true(v);
}

void config_int(struct config *c, const char *key, int64_t min, int64_t max, int64_t *out)
{
    require(c, key);
    config_int_or(c, key, min, max, out);
}

void config_float(struct config *c, const char *key, double min, double max, double *out)
{
    require(c, key);
    config_float_or(c, key, min, max, out);
}

void config_ints(struct config *c, const char *key, int max_count, int64_t min, int64_t max, int64_t *out, int *count)
{
    require(c, key);
    json_t *list = value(c, key), *v;
    size_t i, n = json_array_size(list);
    if (list && (n < 1 || n > (size_t)max_count))
        config_fail(c, ERR_INVALID, "%s must be a list of 1 to %d numbers", key, max_count);
    json_array_foreach(list, i, v)
    {
        if (!whole(v, min, max))
            config_fail(c, ERR_INVALID, "each of %s must be a whole number from %lld to %lld", key, (long long)min,
                        (long long)max);
        else if (i < (size_t)max_count)
            out[i] = json_integer_value(v);
    }
    *count = n <= (size_t)max_count ? (int)n : 0;
}

void config_string(struct config *c, const char *key, char *out, int size)
{
    const char *s = json_string_value(value(c, key));
    snprintf(out, (size_t)size, "%s", s ? s : "");
}

void config_path_or(struct config *c, const char *key, char *out, int size)
{
    json_t *v = value(c, key);
    const char *s = json_string_value(v);
    *out = 0;
    if (!v)
        return;
    if (!s || !*s)
        config_fail(c, ERR_INVALID, "%s must be the path of a file", key);
    else if (snprintf(out, (size_t)size, "%.*s%s", *s == '/' ? 0 : (int)(strrchr(c->path, '/') + 1 - c->path), c->path,
                      s) >= size)
        config_fail(c, ERR_INVALID, "%s: path longer than %d bytes", key, size - 1);
}

void config_choice_or(struct config *c, const char *key, const char *const *names, int *out)
{
    json_t *v = value(c, key);
    const char *s = json_is_string(v) ? json_string_value(v) : "";
    char allowed[200] = "";
    if (!v)
        return;
    for (int i = 0; names[i]; i++) {
        if (strcmp(s, names[i]) == 0) {
            *out = i;
            return;
        }
        snprintf(allowed + strlen(allowed), sizeof allowed - strlen(allowed), "%s%s", i ? ", " : "", names[i]);
    }
    config_fail(c, ERR_INVALID, "%s is \"%.40s\"; allowed: %s", key, s, allowed);
}

void config_refuse(struct config *c, const char *key)
{
    json_t *v = value(c, key);
    if (v && !json_is_false(v))
        config_fail(c, ERR_UNSUPPORTED, "%s is set; only models without it can run", key);
}

void config_require(struct config *c, const char *key, const char *expected)
{
    char found[64];
    config_string(c, key, found, sizeof found);
    if (strcmp(found, expected) != 0)
        config_fail(c, ERR_UNSUPPORTED, "%s is \"%s\"; supported: \"%s\"", key, found, expected);
}

void config_refuse_rest(struct config *c)
{
    const char *key;
    json_t *v;
    if (!c)
        return;
    json_object_foreach(c->root, key, v) if (!json_object_get(c->asked, key))
        config_fail(c, ERR_INVALID, "%.60s is no key of this file", key);
}
