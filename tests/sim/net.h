// net.h: what redis.c and queue.c see of the system in the simulation: sockets that end at our server, our clock, our
// random bytes. The linker puts these in the place of the system's (--wrap, see CMakeLists.txt).
//
// There is one at a time, since the functions of a system have no argument that says whose they are.
#ifndef DITFLEET_SIM_NET_H
#define DITFLEET_SIM_NET_H

#include "store.h"

struct net {
    void *arg;
    // A whole request arrived; appends its reply. false: the connection breaks instead.
    bool (*request)(void *arg, size_t argc, const struct text *argv, struct buffer *reply);
    bool (*reachable)(void *arg);    // may somebody connect now?
    void (*pass)(void *arg, int ms); // somebody waits in vain for so long
    int64_t (*clock_us)(void *arg);  // monotonic
    uint64_t (*random)(void *arg);
};

void net_use(const struct net *net); // NULL: the system's own again
void net_cut(void);                  // every connection breaks

#endif
