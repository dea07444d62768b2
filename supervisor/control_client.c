// The asking side of the control socket, for the command line and the tests.
#include "supervisor/control.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/clock.h"

enum { REPLY_LIMIT = 4 << 20 };

static int connect_to(const char *path, int *fd, struct err *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return err_set(err, ERR_INVALID, "%s: too long for a socket's path", path);
    memcpy(address.sun_path, path, strlen(path));
    *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (*fd < 0)
        return err_set(err, ERR_IO, "cannot make a socket: %s", strerror(errno));
    const struct timeval limit = {.tv_sec = 5};
    setsockopt(*fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit); // also bounds connect
    if (connect(*fd, (struct sockaddr *)&address, sizeof address) == 0)
        return 0;
    err_set(err, ERR_UNAVAILABLE, "%s: no supervisor answers there: %s", path, strerror(errno));
    close(*fd);
    return ERR_UNAVAILABLE;
}

// Reads to the newline or the end, *text is malloc'd also on failure.
static int read_reply(int fd, const char *path, char **text, size_t *length, struct err *err)
{
    double end = monotonic_seconds() + 5;
    size_t room = 0;
    while (*length == 0 || (*text)[*length - 1] != '\n') {
        if (*length == room) {
            room = room ? 2 * room : 16384;
            char *more = room <= REPLY_LIMIT ? realloc(*text, room) : NULL;
            if (!more)
                return err_set(err, ERR_NO_MEMORY, "%s: the answer is too long", path);
            *text = more;
        }
        struct pollfd p = {.fd = fd, .events = POLLIN};
        int left = (int)(1000 * (end - monotonic_seconds()));
        int ready = left > 0 ? poll(&p, 1, left) : 0;
        if (ready == 0)
            return err_set(err, ERR_TIMEOUT, "%s: the supervisor did not answer within 5 s", path);
        ssize_t n = recv(fd, *text + *length, room - *length, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return err_set(err, ERR_UNAVAILABLE, "%s: the supervisor closed the connection", path);
        *length += (size_t)n;
    }
    return 0;
}

static int exchange(int fd, const char *path, const char *request, json_t **reply, struct err *err)
{
    char *text = NULL, *line = NULL;
    size_t length = 0;
    int n = asprintf(&line, "%s\n", request);
    if (n < 0)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", path);
    bool sent = send(fd, line, (size_t)n, MSG_NOSIGNAL) == n;
    free(line);
    if (!sent)
        return err_set(err, ERR_UNAVAILABLE, "%s: the supervisor took no request: %s", path, strerror(errno));
    int rc = read_reply(fd, path, &text, &length, err);
    if (rc == 0) {
        *reply = json_loadb(text, length, 0, NULL);
        if (!json_is_object(*reply))
            rc = err_set(err, ERR_CORRUPT, "%s: the answer is not a JSON object", path);
        else if (!json_is_true(json_object_get(*reply, "ok"))) {
            const char *why = json_string_value(json_object_get(*reply, "error"));
            rc = err_set(err, ERR_REFUSED, "%s", why ? why : "the supervisor refused without a reason");
        }
    }
    free(text);
    return rc;
}

int control_request(const char *path, const char *request, json_t **reply, struct err *err)
{
    int fd = -1;
    *reply = NULL;
    TRY(connect_to(path, &fd, err));
    int rc = exchange(fd, path, request, reply, err);
    close(fd);
    return rc;
}
