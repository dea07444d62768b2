// scripted_redis.h: a peer that says what a test has written down, for what no real server can be made to say.
#ifndef DITFLEET_TESTS_SCRIPTED_REDIS_H
#define DITFLEET_TESTS_SCRIPTED_REDIS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

// Starts a peer that answers whatever it is asked by the next of these lines, over any number of connections; an empty
// one makes it close the connection instead. It ends after the last. url receives where it is.
static inline pid_t serve_lines(const char *const *lines, size_t n, char url[64])
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof a;
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(fd, 8), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&a, &size), 0);
    snprintf(url, 64, "redis://127.0.0.1:%d", ntohs(a.sin_port));
    pid_t child = fork();
    if (child == 0) {
        char command[1000];
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (size_t i = 0; i < n;) {
            int peer = accept(fd, NULL, NULL);
            while (i < n && read(peer, command, sizeof command) > 0) {
                const char *line = lines[i++];
                if (!*line)
                    break;
                if (write(peer, line, strlen(line)) < 0)
                    _exit(1);
            }
            close(peer);
        }
        _exit(0);
    }
    close(fd);
    return child;
}

#endif
