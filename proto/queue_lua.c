// queue_lua.c: the text of queue.lua, carried inside the programs. QUEUE_LUA is its path, given by the build.
#include "proto/queue_lua.h"

__asm__(".section .rodata\n"
        ".global queue_lua_start\n"
        ".global queue_lua_end\n"
        "queue_lua_start:\n"
        ".incbin \"" QUEUE_LUA "\"\n"
        "queue_lua_end:\n"
        ".byte 0\n"
        ".previous\n");
