#include "ops/cli/fetch.h"

#include <curl/curl.h>
#include <errno.h>
#include <openssl/sha.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "ops/cli/keep.h"

struct body {
    char *bytes; // (len), malloc'd
    size_t len, room;
    size_t limit; // what the result says; more is another picture
};

static size_t take(const char *bytes, size_t size, size_t n, void *arg)
{
    struct body *b = arg;
    n *= size;
    if (n > b->limit + 1 - b->len)
        return 0; // makes the transfer fail
    if (b->len + n > b->room) {
        const size_t room = 2 * b->room > b->len + n ? 2 * b->room : b->len + n;
        char *more = realloc(b->bytes, room);
        if (!more)
            return 0;
        b->bytes = more;
        b->room = room;
    }
    memcpy(b->bytes + b->len, bytes, n);
    b->len += n;
    return n;
}

static int get(const char *url, struct body *b, struct err *err)
{
    char why[CURL_ERROR_SIZE] = "";
    long status = 0;
    CURL *curl = curl_easy_init();
    if (!curl)
        return err_set(err, ERR_NO_MEMORY, "no memory for an HTTP request");
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, why);
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT, 10L);
    curl_easy_setopt(curl, CURLOPT_LOW_SPEED_LIMIT, 1L);
    curl_easy_setopt(curl, CURLOPT_LOW_SPEED_TIME, 30L);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, take);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, b);
    const CURLcode code = curl_easy_perform(curl);
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
    curl_easy_cleanup(curl);
    if (status >= 300)
        return err_set(err, ERR_UPLOAD, "%s answers a GET with status %ld; fetch it with your own access", url, status);
    if (code == CURLE_WRITE_ERROR)
        return err_set(err, ERR_CORRUPT, "%s gives more than the %zu bytes of this job's picture", url, b->limit);
    if (code != CURLE_OK)
        return err_set(err, ERR_UNAVAILABLE, "%s: %s", url, *why ? why : curl_easy_strerror(code));
    return 0;
}

static int read_file(const char *path, struct body *b, struct err *err)
{
    char block[16384];
    FILE *f = fopen(path, "re");
    if (!f)
        return err_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: %s here; the node that ran the job wrote it",
                       path, strerror(errno));
    size_t n, taken = 1;
    while ((n = fread(block, 1, sizeof block, f)) > 0 && taken > 0)
        taken = take(block, 1, n, b);
    const bool failed = ferror(f) != 0;
    fclose(f);
    return failed ? err_set(err, ERR_IO, "%s: cannot be read", path) : 0;
}

static int check(const Ditfleet__V1__Image *image, const struct body *b, struct err *err)
{
    unsigned char digest[SHA256_DIGEST_LENGTH];
    char hex[2 * SHA256_DIGEST_LENGTH + 1];
    SHA256((const unsigned char *)b->bytes, b->len, digest);
    for (size_t i = 0; i < sizeof digest; i++)
        snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    if (b->len == image->bytes && strcmp(hex, image->sha256) == 0)
        return 0;
    return err_set(err, ERR_CORRUPT, "%s does not hold this job's picture: %zu bytes there, %llu in the result",
                   image->location, b->len, (unsigned long long)image->bytes);
}

int fetch_picture(const Ditfleet__V1__Image *image, const char *path, struct err *err)
{
    struct body b = {.limit = image->bytes};
    const bool url =
        strncasecmp(image->location, "http://", 7) == 0 || strncasecmp(image->location, "https://", 8) == 0;
    int rc = url ? get(image->location, &b, err) : read_file(image->location, &b, err);
    if (rc == 0)
        rc = check(image, &b, err);
    if (rc == 0)
        rc = keep_file(path, b.bytes, b.len, err);
    free(b.bytes);
    return rc;
}
