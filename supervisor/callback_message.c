#include "supervisor/callback_message.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// ---- secrets

static const char prefix[] = "whsec_";

// Strict Base64. -1: it is none, or of another length than allowed.
static int decode(const char *text, size_t n, unsigned char out[CALLBACK_SECRET_MOST])
{
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    unsigned char room[CALLBACK_SECRET_MOST + 3];
    size_t padding = 0;
    while (padding < 2 && padding < n && text[n - 1 - padding] == '=')
        padding++;
    if (n % 4 || n / 4 * 3 > sizeof room || strspn(text, alphabet) < n - padding)
        return -1;
    int length = EVP_DecodeBlock(room, (const unsigned char *)text, (int)n) - (int)padding;
    bool good = length >= CALLBACK_SECRET_LEAST && length <= CALLBACK_SECRET_MOST;
    if (good)
        memcpy(out, room, (size_t)length);
    OPENSSL_cleanse(room, sizeof room);
    return good ? length : -1;
}

int callback_secrets_parse(const char *text, const char *name, struct callback_secrets *out, struct err *err)
{
    *out = (struct callback_secrets){0};
    int line = 1;
    for (const char *at = text; *at; line++) {
        size_t n = strcspn(at, "\n"), left = n;
        const char *start = at;
        at += n + (at[n] == '\n');
        for (; left && strchr(" \t\r", *start); left--)
            start++;
        while (left && strchr(" \t\r", start[left - 1]))
            left--;
        if (left == 0 || *start == '#')
            continue;
        if (out->count == CALLBACK_MAX_SECRETS)
            return err_set(err, ERR_INVALID, "%s:%d: more than %d secrets; remove the oldest", name, line,
                           CALLBACK_MAX_SECRETS);
        int length = -1;
        if (left > strlen(prefix) && strncmp(start, prefix, strlen(prefix)) == 0)
            length = decode(start + strlen(prefix), left - strlen(prefix), out->key[out->count].bytes);
        if (length < 0)
            return err_set(err, ERR_INVALID,
                           "%s:%d: not a secret; write whsec_ and the Base64 of %d to %d random bytes: "
                           "echo whsec_$(head -c 32 /dev/urandom | base64)",
                           name, line, CALLBACK_SECRET_LEAST, CALLBACK_SECRET_MOST);
        out->key[out->count++].length = (size_t)length;
    }
    return out->count ? 0
                      : err_set(err, ERR_INVALID, "%s: no secret in it; write whsec_... in a line of its own", name);
}

static int check_file(int fd, const char *path, struct err *err)
{
    struct stat st;
    if (fstat(fd, &st) != 0)
        return err_set(err, ERR_IO, "%s: cannot look at the secret file: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return err_set(err, ERR_REFUSED, "%s: the secret file is no regular file", path);
    // Its group may read: that is how secrets are mounted into containers.
    if (st.st_mode & 027)
        return err_set(err, ERR_REFUSED,
                       "%s: the secret file has mode %03o: others may read it, or more than its owner write it; chmod "
                       "600 it",
                       path, (unsigned)(st.st_mode & 0777));
    if (st.st_uid != 0 && st.st_uid != geteuid())
        return err_set(err, ERR_REFUSED, "%s: the secret file belongs to another user (%u); chown it", path,
                       (unsigned)st.st_uid);
    return 0;
}

int callback_secrets_load(const char *path, struct callback_secrets *out, struct err *err)
{
    char text[4096];
    *out = (struct callback_secrets){0};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // of a pipe, open would wait
    if (fd < 0)
        return err_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO,
                       "%s: cannot open the secret file: %s; see [callback] secret_file", path, strerror(errno));
    int rc = check_file(fd, path, err);
    ssize_t n = rc == 0 ? read(fd, text, sizeof text) : 0;
    if (n < 0)
        rc = err_set(err, ERR_IO, "%s: cannot read the secret file: %s", path, strerror(errno));
    close(fd);
    if (rc == 0 && (n == sizeof text || memchr(text, 0, (size_t)n)))
        rc = err_set(err, ERR_INVALID, "%s: no secret file: a zero byte, or 4096 bytes and more", path);
    if (rc == 0) {
        text[n] = 0;
        rc = callback_secrets_parse(text, path, out, err);
    }
    OPENSSL_cleanse(text, sizeof text);
    if (rc != 0)
        callback_secrets_wipe(out);
    return rc;
}

void callback_secrets_wipe(struct callback_secrets *secrets)
{
    OPENSSL_cleanse(secrets, sizeof *secrets);
}

// ---- the signature

int callback_sign(const struct callback_secrets *secrets, const char *message, int64_t time, const char *body,
                  char out[CALLBACK_SIGNATURE_SIZE], struct err *err)
{
    char *text = NULL;
    int length = asprintf(&text, "%s.%" PRId64 ".%s", message, time, body);
    if (length < 0)
        return err_set(err, ERR_NO_MEMORY, "no memory for a callback");
    char *at = out;
    for (int i = 0; i < secrets->count; i++) {
        unsigned char digest[EVP_MAX_MD_SIZE];
        unsigned n = 0;
        if (!HMAC(EVP_sha256(), secrets->key[i].bytes, (int)secrets->key[i].length, (unsigned char *)text,
                  (size_t)length, digest, &n)) {
            free(text);
            return err_set(err, ERR_INTERNAL, "OpenSSL computes no HMAC-SHA256");
        }
        at += sprintf(at, "%sv1,", i ? " " : "");
        at += EVP_EncodeBlock((unsigned char *)at, digest, (int)n);
    }
    free(text);
    return 0;
}

// ---- the body

static json_t *images(const Ditfleet__V1__Result *result)
{
    json_t *list = json_array();
    for (size_t i = 0; i < result->n_images; i++) {
        const Ditfleet__V1__Image *image = result->images[i];
        json_array_append_new(list, json_pack("{s:s,s:I,s:s,s:I}", "location", image->location, "bytes",
                                              (json_int_t)image->bytes, "sha256", image->sha256, "index",
                                              (json_int_t)image->index));
    }
    return list;
}

static void print_time(uint64_t ms, char out[32])
{
    struct tm t;
    time_t seconds = (time_t)(ms / 1000);
    gmtime_r(&seconds, &t);
    size_t n = strftime(out, 32, "%Y-%m-%dT%H:%M:%S", &t);
    snprintf(out + n, 32 - n, ".%03uZ", (unsigned)(ms % 1000));
}

int callback_body(const struct queue_callback *c, char **out, struct err *err)
{
    Ditfleet__V1__Result *result = NULL;
    char type[32], time[32];
    *out = NULL;
    TRY(result_unpack(c->result, c->result_length, &result, err));
    snprintf(type, sizeof type, "job.%s", job_state_name(c->state));
    for (char *p = type; *p; p++)
        *p = (char)(*p >= 'A' && *p <= 'Z' ? *p + 32 : *p);
    print_time(c->time_ms, time);
    const Ditfleet__V1__Error *e = result->error;
    json_t *error = e ? json_pack("{s:s,s:s}", "code", e->code, "message", e->message) : json_null();
    json_t *body = json_pack("{s:s,s:s,s:{s:s,s:s,s:s,s:o,s:o,s:I}}", "type", type, "timestamp", time, "data", "id",
                             c->id, "tenant", c->tenant, "state", job_state_name(c->state), "images", images(result),
                             "error", error, "attempt", (json_int_t)result->attempt);
    result_free(result);
    *out = body ? json_dumps(body, JSON_COMPACT) : NULL;
    json_decref(body);
    return *out ? 0 : err_set(err, ERR_NO_MEMORY, "no memory for the callback of job %s", c->id);
}

// ---- retries

double callback_wait(double least, double most, uint64_t tries, double asked_for, double random)
{
    double wait = fmin(most, least * exp2((double)(tries < 64 ? tries : 64) - 1));
    wait *= 0.5 + 0.5 * random;
    return fmax(wait, fmin(asked_for, most));
}
