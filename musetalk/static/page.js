'use strict'
const $ = id => document.getElementById(id)
const call = {avatar: null, session: null, peer: null, channel: null, audio: null, wanted: false, attempt: 0, timer: 0, connects: 0, spoken: 0, interrupted: 0, frames: 0, stamp: 0}
window.call = call // for tests

// The token comes with the address once, and is kept for this tab only
const address = new URL(location.href)
if (address.searchParams.has('token')) {
  sessionStorage.setItem('token', address.searchParams.get('token'))
  address.searchParams.delete('token')
  history.replaceState(null, '', address)
}

function headers() {
  const token = sessionStorage.getItem('token')
  return token ? {Authorization: `Bearer ${token}`} : {}
}

async function api(method, path, body, type = 'application/json') {
  const answer = await fetch(path, {method, body, headers: body === undefined ? headers() : {...headers(), 'Content-Type': type}}).catch(() => { throw new Error('The server does not answer.') })
  if (answer.status === 401) { askToken(); throw Object.assign(new Error('A token is needed.'), {status: 401}) }
  if (!answer.ok) throw Object.assign(new Error((await answer.json().catch(() => ({}))).error || `The server answered ${answer.status}.`), {status: answer.status})
  return answer
}

function askToken() {
  $('gate-message').textContent = sessionStorage.getItem('token') ? 'That token is not the right one. Whoever started this server was shown it.' : 'This server asks for a token. Whoever started it was shown one.'
  $('token').value = ''
  if (!$('gate').open) $('gate').showModal()
}

function show(state, text) {
  document.body.dataset.state = state
  $('status-text').textContent = text
  const live = state === 'live'
  for (const id of ['microphone', 'sound', 'interrupt', 'text', 'speak']) $(id).disabled = !live
  $('sound-label').setAttribute('aria-disabled', !live)
  $('end').disabled = !call.wanted
  $('start').disabled = !call.avatar
}

function tell(text, stays) {
  $('message').textContent = text || ''
  $('message').hidden = !text
  clearTimeout(tell.timer)
  if (text && !stays) tell.timer = setTimeout(() => tell(''), 9000)
}

// Avatars

async function picture(name) {
  const answer = await api('GET', `/v1/avatars/${encodeURIComponent(name)}/picture`)
  return URL.createObjectURL(await answer.blob())
}

async function listAvatars(choose) {
  const avatars = await (await api('GET', '/v1/avatars')).json()
  const tiles = await Promise.all(avatars.map(async ({name}) => {
    const tile = Object.assign(document.createElement('button'), {className: 'avatar', type: 'button', title: name})
    tile.setAttribute('role', 'radio')
    tile.dataset.name = name
    const image = Object.assign(document.createElement('img'), {alt: '', src: await picture(name)})
    tile.append(image, Object.assign(document.createElement('span'), {textContent: name}))
    tile.onclick = () => chooseAvatar(name, image.src)
    return tile
  }))
  const add = Object.assign(document.createElement('button'), {className: 'avatar new', type: 'button', title: 'Make an avatar of a video or a picture'})
  add.innerHTML = '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M11 5h2v6h6v2h-6v6h-2v-6H5v-2h6z"/></svg><span>New</span>'
  add.onclick = () => $('footage').click()
  $('avatars').replaceChildren(...tiles, add)
  $('hint').hidden = avatars.length > 0
  const name = choose || call.avatar || (avatars[0] && avatars[0].name)
  const tile = tiles.find(tile => tile.dataset.name === name)
  if (tile) chooseAvatar(name, tile.querySelector('img').src)
}

function chooseAvatar(name, source) {
  const changed = call.avatar !== name
  call.avatar = name
  for (const tile of document.querySelectorAll('.avatar[role=radio]')) tile.setAttribute('aria-checked', tile.dataset.name === name)
  $('poster').src = source
  $('poster').hidden = false
  if (call.wanted && changed) { hangUp(); connect() }
  else if (!call.wanted) show('idle', 'Ready')
}

function upload(path, file, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest()
    request.open('POST', path)
    for (const [name, value] of Object.entries({...headers(), 'Content-Type': 'application/octet-stream'})) request.setRequestHeader(name, value)
    request.upload.onprogress = event => progress && progress(event.loaded / event.total)
    request.onerror = () => reject(new Error('The upload was cut off; it may be too large.'))
    request.onload = () => {
      let answer = null
      try { answer = JSON.parse(request.responseText) } catch { answer = {} }
      request.status < 300 ? resolve(answer) : reject(new Error(answer.error || `The server answered ${request.status}.`))
    }
    request.send(file)
  })
}

async function newAvatar(file) {
  const name = file.name.replace(/\.[^.]*$/, '').replace(/[^\p{L}\p{N}_ .-]/gu, ' ').replace(/\.{2,}/g, '.').trim().replace(/^[^\p{L}\p{N}_]+|[^\p{L}\p{N}_]+$/gu, '').slice(0, 60).trim() || 'avatar'
  const bar = $('progress')
  bar.hidden = false
  try {
    bar.value = 0
    let job = await upload(`/v1/avatars?name=${encodeURIComponent(name)}&filename=${encodeURIComponent(file.name)}`, file, share => { bar.value = share })
    bar.removeAttribute('value')
    while (job.state === 'waiting' || job.state === 'working') {
      await new Promise(resolve => setTimeout(resolve, 700))
      job = await (await api('GET', `/v1/jobs/${job.id}`)).json()
    }
    if (job.state === 'failed') throw new Error(job.error)
    await listAvatars(name)
  } finally { bar.hidden = true }
}

// The call

function gathered(peer) {
  return new Promise(resolve => {
    if (peer.iceGatheringState === 'complete') return resolve()
    peer.addEventListener('icegatheringstatechange', () => peer.iceGatheringState === 'complete' && resolve())
    setTimeout(resolve, 1500)
  })
}

async function connect() {
  call.wanted = true
  show('connecting', call.attempt ? 'Connecting again …' : 'Connecting …')
  const peer = call.peer = new RTCPeerConnection({iceServers: []})
  const channel = call.channel = peer.createDataChannel('control')
  peer.addTransceiver('video', {direction: 'recvonly'})
  call.audio = peer.addTransceiver('audio', {direction: 'sendrecv'})
  const mine = () => call.peer === peer
  peer.ontrack = event => { if (mine()) $('video').srcObject = event.streams[0] }
  peer.onconnectionstatechange = () => { if (mine() && ['failed', 'disconnected'].includes(peer.connectionState)) lost('The connection was lost') }
  channel.onclose = () => { if (mine()) lost('The server has ended the call') }
  channel.onmessage = event => mine() && heard(JSON.parse(event.data))
  channel.onopen = () => {
    if (!mine()) return
    call.attempt = 0
    call.connects++
    show('live', 'Live')
    tell('')
    if ($('microphone').getAttribute('aria-pressed') === 'true') microphone(true)
  }
  try {
    await peer.setLocalDescription(await peer.createOffer())
    await gathered(peer)
    const answer = await (await api('POST', '/v1/sessions', JSON.stringify({avatar: call.avatar, ...peer.localDescription.toJSON()}))).json()
    if (!mine()) return
    call.session = answer.session
    await peer.setRemoteDescription({sdp: answer.sdp, type: answer.type})
    setTimeout(() => { if (mine() && document.body.dataset.state === 'connecting') lost('The connection did not come about') }, 15000)
  } catch (error) {
    if (mine()) lost(error.message, [400, 401, 404].includes(error.status))
  }
}

function lost(text, final) {
  const wanted = call.wanted && !final
  hangUp()
  const sentence = /[.!?]$/.test(text) ? text : `${text}.`
  tell(wanted ? `${sentence} Trying again …` : sentence, wanted)
  if (!wanted) return show('failed', 'Not connected')
  call.wanted = true
  call.attempt++
  show('waiting', 'Connecting again …')
  call.timer = setTimeout(connect, Math.min(8000, 400 * 2 ** call.attempt))
}

function hangUp() {
  clearTimeout(call.timer)
  const {peer, session} = call
  Object.assign(call, {peer: null, channel: null, session: null, audio: null, wanted: false, frames: 0, stamp: 0})
  document.body.dataset.speaking = 'no'
  if (peer) peer.close()
  if (session) api('DELETE', `/v1/sessions/${session}`).catch(() => {})
  show('idle', 'Ready')
}

function send(message) { if (call.channel && call.channel.readyState === 'open') call.channel.send(JSON.stringify(message)) }

function heard(message) {
  if (message.type === 'figures') {
    $('response').textContent = message.response_ms ?? '–'
    $('drift').textContent = message.drift_ms.toFixed(0)
    $('waiting').textContent = message.waiting_seconds.toFixed(1)
    $('late').textContent = message.late_frames
    $('made').textContent = message.fps.toFixed(1)
    document.body.dataset.speaking = message.waiting_seconds > .05 ? 'yes' : 'no'
    received()
  }
  else if (message.type === 'spoken') { call.spoken++; document.body.dataset.speaking = 'no' }
  else if (message.type === 'interrupted') { call.interrupted++; document.body.dataset.speaking = 'no' }
  else if (message.type === 'error') tell(message.message)
  else if (message.type === 'closed') lost(message.message[0].toUpperCase() + message.message.slice(1))
}

async function received() {
  const peer = call.peer
  if (!peer) return
  for (const row of (await peer.getStats()).values()) {
    if (row.type === 'inbound-rtp' && row.kind === 'video') {
      if (call.stamp) $('fps').textContent = (1000 * (row.framesDecoded - call.frames) / (row.timestamp - call.stamp)).toFixed(1)
      Object.assign(call, {frames: row.framesDecoded, stamp: row.timestamp})
      $('freezes').textContent = row.freezeCount ?? 0
    }
    if (row.type === 'candidate-pair' && row.nominated && row.currentRoundTripTime !== undefined) $('network').textContent = (1000 * row.currentRoundTripTime).toFixed(0)
  }
}

async function microphone(on) {
  const sender = call.audio && call.audio.sender
  if (!sender) return
  if (sender.track) sender.track.stop()
  await sender.replaceTrack(null)
  if (on) {
    const stream = await navigator.mediaDevices.getUserMedia({audio: {echoCancellation: true, noiseSuppression: true, autoGainControl: true}})
    await sender.replaceTrack(stream.getAudioTracks()[0])
  }
  $('microphone').setAttribute('aria-pressed', on)
  send({type: 'microphone', on})
}

// What people do

const careful = act => async event => {
  if (event) event.preventDefault()
  try { await act(event) } catch (error) { if (error.status !== 401) tell(error.name === 'NotAllowedError' ? 'The browser does not allow the microphone; allow it beside the address above, then try again.' : error.message) }
}
const interrupt = () => send({type: 'interrupt'})

$('start').onclick = careful(connect)
$('end').onclick = () => { hangUp(); $('microphone').setAttribute('aria-pressed', false) }
$('interrupt').onclick = interrupt
$('microphone').onclick = careful(() => microphone($('microphone').getAttribute('aria-pressed') !== 'true'))
$('sound').onchange = careful(async () => {
  const file = $('sound').files[0]
  $('sound').value = ''
  if (!file || !call.session) return
  if ($('microphone').getAttribute('aria-pressed') === 'true') await microphone(false)
  await upload(`/v1/sessions/${call.session}/sound?filename=${encodeURIComponent(file.name)}`, file)
})
$('footage').onchange = careful(async () => {
  const file = $('footage').files[0]
  $('footage').value = ''
  if (file) await newAvatar(file)
})
$('say').onsubmit = careful(async () => {
  const text = $('text').value.trim()
  if (!text || !call.session) return
  if ($('microphone').getAttribute('aria-pressed') === 'true') await microphone(false)
  await api('POST', `/v1/sessions/${call.session}/say`, JSON.stringify({text}))
  $('text').value = ''
})
$('gate').onclose = careful(async () => { if ($('token').value) { sessionStorage.setItem('token', $('token').value); await listAvatars() } else tell('Without its token this server does nothing; reload the page to enter it.', true) })
document.addEventListener('keydown', event => { if (event.key === 'Escape' && document.body.dataset.state === 'live') interrupt() })
window.addEventListener('pagehide', () => { if (call.session) fetch(`/v1/sessions/${call.session}`, {method: 'DELETE', headers: headers(), keepalive: true}) })
setInterval(() => send({type: 'ping'}), 3000)
careful(() => listAvatars())()
