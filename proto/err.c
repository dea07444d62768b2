#include "proto/err.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    bool retryable;
} codes[] = {
    [ERR_NONE] = {"none", false},
    [ERR_INVALID] = {"invalid", false},
    [ERR_UNSUPPORTED] = {"unsupported", false},
    [ERR_NOT_FOUND] = {"not_found", false},
    [ERR_CORRUPT] = {"corrupt", false},
    [ERR_CONFLICT] = {"conflict", false},
    [ERR_REFUSED] = {"refused", false},
    [ERR_MODERATED] = {"moderated", false},
    [ERR_CANCELLED] = {"cancelled", false},
    [ERR_EXPIRED] = {"expired", false},
    [ERR_STALE] = {"stale", false},
    [ERR_UPLOAD] = {"upload", false},
    [ERR_OVERLOADED] = {"overloaded", true},
    [ERR_NO_MEMORY] = {"no_memory", true},
    [ERR_IO] = {"io", true},
    [ERR_TIMEOUT] = {"timeout", true},
    [ERR_UNAVAILABLE] = {"unavailable", true},
    [ERR_CRASHED] = {"crashed", true},
    [ERR_INTERNAL] = {"internal", true},
};
static_assert(sizeof codes / sizeof *codes == ERR_CODES, "every code has a row");

static void make_printable(char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || *text == 0x7f)
            *text = '?';
}

int err_set(struct err *e, enum err_code code, const char *format, ...)
{
    if (!e)
        return code;
    e->code = code;
    e->retryable = codes[code].retryable;
    va_list args;
    va_start(args, format);
    vsnprintf(e->text, sizeof e->text, format, args);
    va_end(args);
    make_printable(e->text);
    return code;
}

int err_context(struct err *e, const char *format, ...)
{
    if (!e)
        return ERR_INTERNAL;
    char text[sizeof e->text], inner[sizeof e->text];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memcpy(inner, e->text, sizeof inner);
    snprintf(e->text, sizeof e->text, "%.200s: %.300s", text, inner);
    make_printable(e->text);
    return e->code;
}

const char *err_name(enum err_code code)
{
    return (unsigned)code < ERR_CODES ? codes[code].name : "unknown";
}

enum err_code err_parse(const char *name)
{
    for (int code = ERR_NONE; code < ERR_CODES; code++)
        if (strcmp(codes[code].name, name) == 0)
            return (enum err_code)code;
    return ERR_INTERNAL;
}

bool err_code_retryable(enum err_code code)
{
    return (unsigned)code < ERR_CODES && codes[code].retryable;
}
