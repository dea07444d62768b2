# `cmake --install`, and by `cpack -G DEB` the same as a Debian package. Programs find each other, and the CUDA backend, in
# the folder they lie in, whatever link they are started by. The configuration is /etc/ditfleet/ditfleet.conf everywhere.
set(made ${CMAKE_BINARY_DIR}/install)
file(MAKE_DIRECTORY ${made})

install(TARGETS ditfleet ditfleet-supervisor ditfleet-worker DESTINATION lib/ditfleet)
if(TARGET ditfleet_cuda)
  install(TARGETS ditfleet_cuda DESTINATION lib/ditfleet)
endif()
foreach(program ditfleet ditfleet-supervisor)
  file(CREATE_LINK ../lib/ditfleet/${program} ${made}/${program} SYMBOLIC)
  install(FILES ${made}/${program} DESTINATION bin)
endforeach()

# Units name absolute paths, which are known when it is installed.
install(CODE "
  set(bin \${CMAKE_INSTALL_PREFIX}/bin)
  foreach(unit ditfleet-supervisor.service gpu.conf)
    configure_file(${CMAKE_SOURCE_DIR}/systemd/\${unit}.in ${made}/\${unit} @ONLY)
  endforeach()")
install(FILES ${made}/ditfleet-supervisor.service systemd/ditfleet.slice DESTINATION lib/systemd/system)
install(FILES ${made}/gpu.conf DESTINATION share/ditfleet)
install(FILES systemd/ditfleet.sysusers DESTINATION lib/sysusers.d RENAME ditfleet.conf)
install(FILES systemd/ditfleet.tmpfiles DESTINATION lib/tmpfiles.d RENAME ditfleet.conf)

# What the program says of itself: manual pages and the example of a configuration.
install(CODE "execute_process(COMMAND ${CMAKE_SOURCE_DIR}/systemd/manuals $<TARGET_FILE:ditfleet> ${made}
  COMMAND_ERROR_IS_FATAL ANY)")
install(DIRECTORY ${made}/man1 ${made}/man5 DESTINATION share/man)
install(CODE "
  if(NOT EXISTS \$ENV{DESTDIR}/etc/ditfleet/ditfleet.conf) # one that is there is somebody's
    file(INSTALL ${made}/ditfleet.conf DESTINATION /etc/ditfleet)
  endif()")
install(FILES ops/cli/completion.bash DESTINATION share/bash-completion/completions RENAME ditfleet)
install(FILES proto/PROTOCOL.md proto/job.proto LICENSE DESTINATION share/doc/ditfleet)

set(CPACK_GENERATOR DEB)
set(CPACK_SET_DESTDIR ON) # else units would name the folder in which the package is made
set(CPACK_INSTALL_PREFIX /usr)
set(CPACK_STRIP_FILES ON)
set(CPACK_PACKAGE_CONTACT "the operators of ditfleet <root@localhost>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "image generation on a fleet of GPU workers, driven by a queue in Redis")
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION net)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_DEPENDS systemd)
set(CPACK_DEBIAN_PACKAGE_SUGGESTS redis-server)
foreach(script conffiles postinst prerm postrm)
  list(APPEND CPACK_DEBIAN_PACKAGE_CONTROL_EXTRA ${CMAKE_SOURCE_DIR}/systemd/debian/${script})
endforeach()
include(CPack)
