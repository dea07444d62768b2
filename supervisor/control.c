// The server of the control socket: a client is read until its newline, answered, and closed.
#include "supervisor/control.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { REQUEST_BYTES = 4096, MAX_CLIENTS = 32 };

struct client {
    struct control *control;
    int slot; // in control->clients
    int fd;
    sd_event_source *source;
    char request[REQUEST_BYTES];
    size_t got;
    char *reply; // malloc; NULL: still reading
    size_t length, sent;
};

struct control {
    int fd;
    char path[CONTROL_PATH_BYTES];
    sd_event *event;
    sd_event_source *source;
    control_handler *handler;
    void *arg;
    struct client *clients[MAX_CLIENTS]; // NULL: free
};

const char *control_path(const struct conf *conf, char out[CONTROL_PATH_BYTES])
{
    snprintf(out, CONTROL_PATH_BYTES, "%s/control.sock", conf->fleet.state_dir);
    return out;
}

static void close_client(struct client *c)
{
    c->control->clients[c->slot] = NULL;
    sd_event_source_disable_unref(c->source);
    close(c->fd);
    free(c->reply);
    free(c);
}

static void answer(struct client *c, size_t line)
{
    json_error_t where;
    json_t *request = json_loadb(c->request, line, 0, &where), *reply = NULL;
    if (json_is_object(request))
        reply = c->control->handler(c->control->arg, request);
    else
        reply = json_pack("{s:b,s:s}", "ok", 0, "error", "the request is not one JSON object in a line");
    char *text = reply ? json_dumps(reply, JSON_COMPACT) : NULL;
    json_decref(request);
    json_decref(reply);
    if (text && asprintf(&c->reply, "%s\n", text) < 0)
        c->reply = NULL;
    free(text);
    c->length = c->reply ? strlen(c->reply) : 0;
}

// false: nothing more to wait for.
static bool read_request(struct client *c)
{
    ssize_t n = recv(c->fd, c->request + c->got, sizeof c->request - c->got, 0);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    c->got += (size_t)n;
    char *newline = memchr(c->request, '\n', c->got);
    if (!newline)
        return n > 0 && c->got < sizeof c->request;
    answer(c, (size_t)(newline - c->request));
    return c->reply && sd_event_source_set_io_events(c->source, EPOLLOUT) >= 0;
}

static bool write_reply(struct client *c)
{
    ssize_t n = send(c->fd, c->reply + c->sent, c->length - c->sent, MSG_NOSIGNAL);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    c->sent += (size_t)n;
    return c->sent < c->length;
}

static int on_client(sd_event_source *source, int fd, uint32_t events, void *arg)
{
    (void)source, (void)fd, (void)events;
    struct client *c = arg;
    if (!(c->reply ? write_reply(c) : read_request(c)))
        close_client(c);
    return 0;
}

static int on_accept(sd_event_source *source, int fd, uint32_t events, void *arg)
{
    (void)source, (void)events;
    struct control *control = arg;
    int client = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), slot = 0;
    if (client < 0)
        return 0;
    while (slot < MAX_CLIENTS && control->clients[slot])
        slot++;
    struct client *c = slot < MAX_CLIENTS ? calloc(1, sizeof *c) : NULL;
    if (!c) {
        close(client);
        return 0;
    }
    *c = (struct client){.control = control, .slot = slot, .fd = client};
    control->clients[slot] = c;
    if (sd_event_add_io(control->event, &c->source, client, EPOLLIN, on_client, c) < 0)
        close_client(c);
    return 0;
}

int control_open(sd_event *event, const char *path, control_handler *handler, void *arg, struct control **out,
                 struct err *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return err_set(err, ERR_INVALID, "%s: too long for a socket's path; shorten [fleet] state_dir", path);
    memcpy(address.sun_path, path, strlen(path));
    struct control *c = calloc(1, sizeof *c);
    if (!c)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", path);
    c->event = event;
    c->handler = handler;
    c->arg = arg;
    snprintf(c->path, sizeof c->path, "%s", path);
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    unlink(path);
    // The mode is set before bind makes the name, so there is no moment in which others could connect.
    if (c->fd < 0 || fchmod(c->fd, 0600) != 0 || bind(c->fd, (struct sockaddr *)&address, sizeof address) != 0 ||
        listen(c->fd, 16) != 0 || sd_event_add_io(event, &c->source, c->fd, EPOLLIN, on_accept, c) < 0) {
        err_set(err, ERR_IO, "%s: cannot open the control socket: %s", path, strerror(errno));
        control_close(c);
        return err ? (int)err->code : ERR_IO;
    }
    *out = c;
    return 0;
}

void control_close(struct control *c)
{
    if (!c)
        return;
    for (int i = 0; i < MAX_CLIENTS; i++)
        if (c->clients[i])
            close_client(c->clients[i]);
    sd_event_source_disable_unref(c->source);
    if (c->fd >= 0) {
        unlink(c->path);
        close(c->fd);
    }
    free(c);
}
