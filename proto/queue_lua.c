// queue_lua.c: the texts of the Lua scripts, carried inside the programs. QUEUE_LUA and GATHER_LUA are their paths,
// given by the build.
#include "proto/queue_lua.h"

#define CARRY(name, path)                                                                                              \
    __asm__(".section .rodata\n"                                                                                       \
            ".global " name "_start\n"                                                                                 \
            ".global " name "_end\n" name "_start:\n"                                                                  \
            ".incbin \"" path "\"\n" name "_end:\n"                                                                    \
            ".byte 0\n"                                                                                                \
            ".previous\n")

CARRY("queue_lua", QUEUE_LUA);
CARRY("gather_lua", GATHER_LUA);
